"""Tiny random models of every supported architecture, as Hugging Face folders.

Their configurations are in `tests/tiny_configs.py`. The weights are a function of the configuration and a
seed alone, so nothing but the expected logits has to be stored (`tests/goldens`, written by
`tools/make_goldens.py`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models

from tests.tiny_configs import CONFIGS, Config
from tests.tiny_shapes import shapes

Tensors = dict[str, NDArray[np.float32]]

SEED = 20240229
"""The seed of the weights behind the stored goldens."""

# The smallest vocabulary of any configuration: token sequences stay below it.
SMALLEST_VOCAB = 96

# Stored in two files with an index, as large models are.
SHARDED = "qwen2_gqa_tied"


def tokens(length: int, seed: int = SEED) -> list[int]:
    """Token ids that every configuration knows."""
    draws = np.random.Generator(np.random.PCG64(seed)).random(length)
    return [int(x * SMALLEST_VOCAB) for x in draws]


def attention_of(config: Mapping[str, Any]) -> str:
    """The implementation of attention to ask transformers for: eager adds Falcon's ALiBi twice in 5.23."""
    return "sdpa" if config.get("alibi") else "eager"


def positions(config: Mapping[str, Any]) -> int:
    """The context a configuration is for."""
    return int(config.get("max_position_embeddings", config.get("n_positions", 0)))


def weights(config: Mapping[str, Any], seed: int) -> Tensors:
    """Random weights that float16 holds exactly, under which every option shows in the logits.

    Logits have a standard deviation of about 1. The two branches of a layer add to the residual
    rather than drown it, so rounding keys and values to float16, as the cache does, moves logits by
    about 5e-4: a tolerance of 1e-3 leaves room for it. `tools/make_goldens.py` checks both.
    """
    # The generator is named in full: what `default_rng` returns may change between versions.
    random = np.random.Generator(np.random.PCG64(seed)).random
    found: Tensors = {}
    for name, shape in shapes(config).items():
        unit = 2.0 * random(shape) - 1.0  # uniform in -1 to 1: variance 1/3
        if len(shape) > 1 and not name.endswith("_bias"):
            values = unit * _gain(name, config) * np.sqrt(3.0 / shape[-2 if is_transposed(name) else -1])
        elif is_gain(name):
            values = _norm_scale(name, config) * (1.0 + 0.5 * unit) - config["model_type"].startswith("gemma")
        else:
            values = unit * (0.2 if config["model_type"] in ("opt", "gpt_oss") else 1.0)
        found[name] = values.astype(np.float16).astype(np.float32)
    return found


def is_gain(name: str) -> bool:
    """Whether a tensor holds the gains of a norm."""
    return name.endswith(
        ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "ln_attn.weight", "ln_mlp.weight")
    )


def is_transposed(name: str) -> bool:
    """Whether a matrix is stored as [inputs, outputs]: GPT-2's but embeddings, gpt-oss' of experts."""
    of_experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return of_experts or (".c_" in name and name.startswith("transformer."))


_BEHIND = {
    "gemma2": (0.4, "post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": (0.2, "post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": (0.05, "post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": (0.04, "post_attention_layernorm", "post_feedforward_layernorm"),
    "exaone4": (0.05, "post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": (0.05, "post_self_attn_layernorm", "post_mlp_layernorm"),
}
"""Of architectures with norms behind attention and feed-forward: their names, and how much they add to the
residual, which Gemma's scaled embedding makes larger."""


def _norm_scale(name: str, config: Mapping[str, Any]) -> float:
    """The size of a norm's outputs."""
    scale, *names = _BEHIND.get(config["model_type"], (1.0,))
    return float(scale) if name.split(".")[-2] in names else 1.0


def _gain(name: str, config: Mapping[str, Any]) -> float:
    """How much larger the outputs of a matrix are than its inputs."""
    kind = name.split(".")[-2]
    if kind in ("w2", "output_linear") or (".experts." in name and "down_proj" in name):
        return 0.15  # less and the weights of a sum of experts would not show
    if kind in ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "out_proj", "fc2"):
        return 1.0 if config["model_type"] in _BEHIND else 0.05
    # A router of gain 3 prefers some experts clearly: no choice hangs on a rounding.
    return {"gate": 3.0, "layer": 3.0, "router": 3.0}.get(kind, 1.0)


def digest(tensors: Tensors) -> str:
    """SHA-256 over names and little-endian float32 values, in order of name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].astype("<f4").tobytes())
    return total.hexdigest()


def tokenizer() -> Tokenizer:
    """One token per character of printable ASCII that fits below `SMALLEST_VOCAB`."""
    specials = ["<unk>", "<s>", "</s>"]
    characters = "\n" + "".join(chr(c) for c in range(ord(" "), ord("~")) if chr(c) not in "`^")
    vocab = {token: i for i, token in enumerate([*specials, *characters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return made


def write_model(folder: Path, config: Config, tensors: Tensors, shards: int = 1) -> None:
    """A Hugging Face model folder as `save_pretrained` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    _write_json(folder / "generation_config.json", ids | {"_from_model_config": True})
    (folder / "tokenizer.json").write_text(tokenizer().to_str(pretty=True), encoding="utf-8")

    dtype = np.dtype(config.get("dtype", config.get("torch_dtype")))
    stored = {name: values.astype(dtype) for name, values in tensors.items()}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    names = list(stored)
    for i in range(shards):
        file_name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[i::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file_name)
    total = sum(values.nbytes for values in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)


def write_folder(folder: Path, name: str, seed: int = SEED) -> None:
    """The model `name` of `CONFIGS` as a Hugging Face folder."""
    config = CONFIGS[name]
    write_model(folder, config, weights(config, seed), shards=2 if name == SHARDED else 1)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
