"""Tiny random models of every supported architecture, as Hugging Face folders.

Each name in `CONFIGS` is a whole `config.json`; together they turn on every option that changes
the arithmetic. The weights are a function of the configuration and a seed alone, so nothing but
the expected logits has to be stored (`tests/goldens`, written by `tools/make_goldens.py`).
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

Config = dict[str, Any]
Tensors = dict[str, NDArray[np.float32]]

SEED = 20240229
"""The seed of the weights behind the stored goldens."""

# The smallest vocabulary of any configuration: token sequences stay below it.
SMALLEST_VOCAB = 96

# Stored in two files with an index, as large models are.
SHARDED = "qwen2_gqa_tied"


def _config(model_type: str, class_name: str, **options: Any) -> Config:
    """The keys that all architectures share, in the style transformers 5 writes them."""
    shared: Config = {
        "architectures": [class_name],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": 128,
    }
    return shared | options


def _llama(**options: Any) -> Config:
    own = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    return _config("llama", "LlamaForCausalLM", **own | options)


def _mistral(**options: Any) -> Config:
    return _config("mistral", "MistralForCausalLM", **{"sliding_window": None} | options)


def _qwen(model_type: str, class_name: str, **options: Any) -> Config:
    own = {
        "bos_token_id": None,
        "layer_types": ["full_attention"] * options.get("num_hidden_layers", 2),
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return _config(model_type, class_name, **own | options)


def _qwen2(**options: Any) -> Config:
    config = _qwen("qwen2", "Qwen2ForCausalLM", **options)
    del config["head_dim"]  # qwen2 has no such option: it is always hidden / heads
    return config


def _qwen3(**options: Any) -> Config:
    return _qwen("qwen3", "Qwen3ForCausalLM", **{"attention_bias": False} | options)


def _mixtral(**options: Any) -> Config:
    own = {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": None}
    return _config("mixtral", "MixtralForCausalLM", **own | options)


def _olmoe(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
    }
    config = _config("olmoe", "OlmoeForCausalLM", **own | options)
    del config["head_dim"]  # olmoe's norms are made for hidden / heads
    return config


def _qwen2_moe(**options: Any) -> Config:
    own = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 56,
    }
    config = _qwen("qwen2_moe", "Qwen2MoeForCausalLM", **own | options)
    del config["head_dim"]
    return config


def _qwen3_moe(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return _config("qwen3_moe", "Qwen3MoeForCausalLM", **own | options)


def _granitemoe(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "residual_multiplier": 0.7,
    }
    return _config("granitemoe", "GraniteMoeForCausalLM", **own | options)


def _as_version_4(config: Config) -> Config:
    """The same configuration as transformers 4 wrote it: rope keys at top level, few derived keys."""
    old = {key: value for key, value in config.items() if key not in ("head_dim", "layer_types")}
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    old["torch_dtype"] = old.pop("dtype")
    return old | {"transformers_version": "4.43.0"}


# Llama 3.1's parameters with a context of 64 instead of 8192. With 12 frequencies, wavelengths
# 6.3 (kept), 19 and 56 (the smooth band, 16 to 64) and 167 and longer (divided) all occur.
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
    "rope_type": "llama3",
}
YARN_ROPE = {
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "rope_type": "yarn",
}

CONFIGS: dict[str, Config] = {
    # llama: head sharing, embeddings, biases, activations, sizes that fill no block
    "llama_mha": _llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8),
    "llama_gqa_tied": _llama(tie_word_embeddings=True, max_position_embeddings=256),
    "llama_mqa_odd_sizes": _llama(
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=172,
        num_hidden_layers=3,
        vocab_size=99,
    ),
    "llama_head_dim": _llama(hidden_size=40, head_dim=24, intermediate_size=88, vocab_size=96),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True, hidden_size=48, head_dim=12),
    "llama_relu_f16": _llama(hidden_act="relu", dtype="float16", hidden_size=32, head_dim=8),
    "llama_relu2": _llama(hidden_act="relu2", hidden_size=48, head_dim=12, vocab_size=112),
    "llama_gelu_tanh": _llama(hidden_act="gelu_pytorch_tanh", hidden_size=48, head_dim=12, rms_norm_eps=0.02),
    # llama: rope
    "llama_rope_linear": _llama(
        rope_parameters={"factor": 4.0, "rope_theta": 10000.0, "rope_type": "linear"},
    ),
    "llama_rope_llama3": _llama(
        rope_parameters=LLAMA3_ROPE, hidden_size=48, head_dim=24, max_position_embeddings=256
    ),
    "llama_rope_llama3_v4": _as_version_4(
        _llama(rope_parameters=LLAMA3_ROPE, num_attention_heads=2, max_position_embeddings=256)
    ),
    "llama_rope_dynamic": _llama(
        rope_parameters={"factor": 4.0, "rope_theta": 10000.0, "rope_type": "dynamic"},
    ),
    "llama_rope_yarn": _llama(rope_parameters=YARN_ROPE, max_position_embeddings=128),
    # mistral: a window in every layer, or none
    "mistral_window": _mistral(sliding_window=8, num_hidden_layers=3),
    "mistral_mqa_tied_head_dim": _mistral(
        hidden_size=40,
        head_dim=24,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        vocab_size=101,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    ),
    "mistral_window_yarn_factor": _mistral(
        hidden_size=40,
        head_dim=10,
        num_key_value_heads=4,
        intermediate_size=172,
        max_position_embeddings=128,
        sliding_window=16,
        rope_parameters=YARN_ROPE | {"attention_factor": 0.8},
    ),
    # qwen2: biases on q, k and v; windows in the upper layers
    "qwen2_gqa_tied": _qwen2(
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    ),
    "qwen2_mqa_unused_window": _qwen2(
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=172,
        vocab_size=103,
        sliding_window=8,
    ),
    "qwen2_mha_window_layers": _qwen2(
        num_key_value_heads=4,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "qwen2_window_yarn_v4": _as_version_4(
        _qwen2(
            num_hidden_layers=3,
            max_position_embeddings=128,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=2,
            rope_parameters={
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1000000.0,
                "type": "yarn",  # the name of the key before "rope_type"
            },
        )
    ),
    # qwen3: norms on q and k; windows per layer
    "qwen3_gqa_tied_head_dim": _qwen3(
        hidden_size=40,
        head_dim=24,
        tie_word_embeddings=True,
        rms_norm_eps=0.01,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    ),
    "qwen3_mqa_odd_sizes": _qwen3(
        hidden_size=40,
        head_dim=24,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=172,
        vocab_size=97,
    ),
    "qwen3_mha_biases": _qwen3(attention_bias=True, hidden_size=48, head_dim=12, num_key_value_heads=4),
    "qwen3_alternating_windows": _qwen3(
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=10,
        max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3_rope_yarn_mscale": _qwen3(
        max_position_embeddings=128,
        rope_parameters=YARN_ROPE
        | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 2.5, "mscale_all_dim": 0.5, "truncate": False},
    ),
    # experts: always normalised; sizes that fill no block; one expert of a token; a window
    "mixtral_gqa_tied": _mixtral(tie_word_embeddings=True),
    "mixtral_window_odd_sizes": _mixtral(
        hidden_size=40,
        head_dim=12,
        intermediate_size=44,
        num_experts_per_tok=1,
        num_local_experts=19,
        sliding_window=10,
    ),
    # olmoe: norms over all heads; weights as they are, or normalised
    "olmoe_mha": _olmoe(),
    "olmoe_gqa_biases_normalised": _olmoe(
        attention_bias=True,
        hidden_act="relu",
        hidden_size=48,
        norm_topk_prob=True,
        num_experts_per_tok=2,
        num_key_value_heads=2,
    ),
    # qwen2_moe: a shared expert behind a gate; dense layers of another width
    "qwen2_moe_shared": _qwen2_moe(),
    "qwen2_moe_dense_layers": _qwen2_moe(
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        num_hidden_layers=4,
        norm_topk_prob=True,
        qkv_bias=False,
        layer_types=["full_attention"] * 4,
    ),
    "qwen2_moe_window": _qwen2_moe(
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # qwen3_moe: normalised or not; norms of heads
    "qwen3_moe_gqa_tied": _qwen3_moe(hidden_size=40, head_dim=24, tie_word_embeddings=True),
    "qwen3_moe_biases_window": _qwen3_moe(
        attention_bias=True,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        sliding_window=10,
        use_sliding_window=True,
    ),
    # granitemoe: every multiplier, with the embedding shared and not
    "granitemoe_tied": _granitemoe(tie_word_embeddings=True, attention_bias=True),
    "granitemoe_untied": _granitemoe(hidden_size=48, head_dim=12),
}


def tokens(length: int, seed: int = SEED) -> list[int]:
    """Token ids that every configuration knows."""
    draws = np.random.Generator(np.random.PCG64(seed)).random(length)
    return [int(x * SMALLEST_VOCAB) for x in draws]


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model under its Hugging Face name."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    q, kv, ffn = heads * head_dim, config["num_key_value_heads"] * head_dim, config["intermediate_size"]
    kind = config["model_type"]
    qkv_bias = kind == "qwen2" or config.get("attention_bias", config.get("qkv_bias", False))
    output_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    linears = (
        ("self_attn.q_proj", q, width, qkv_bias),
        ("self_attn.k_proj", kv, width, qkv_bias),
        ("self_attn.v_proj", kv, width, qkv_bias),
        ("self_attn.o_proj", width, q, output_bias),
    )
    dense = (
        ("mlp.gate_proj", ffn, width, mlp_bias),
        ("mlp.up_proj", ffn, width, mlp_bias),
        ("mlp.down_proj", width, ffn, mlp_bias),
    )
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows, columns, bias in (*linears, *(() if has_experts(config, i) else dense)):
            found[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                found[f"{layer}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{name}.weight"] = (width,)
        if has_experts(config, i):
            found |= {f"{layer}.{name}": shape for name, shape in expert_shapes(config).items()}
        if kind in ("qwen3", "qwen3_moe"):
            for name in ("q_norm", "k_norm"):
                found[f"{layer}.self_attn.{name}.weight"] = (head_dim,)
        if kind == "olmoe":
            found[f"{layer}.self_attn.q_norm.weight"] = (q,)
            found[f"{layer}.self_attn.k_norm.weight"] = (kv,)
    found["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer routes its tokens."""
    if config.get("num_experts", config.get("num_local_experts")) is None:
        return False
    return layer not in config.get("mlp_only_layers", ()) and not (layer + 1) % config.get(
        "decoder_sparse_step", 1
    )


def expert_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's experts, as checkpoints on the hub name them."""
    width, kind = config["hidden_size"], config["model_type"]
    count = config.get("num_experts", config.get("num_local_experts"))
    ffn = config.get("moe_intermediate_size", config["intermediate_size"])
    if kind == "granitemoe":
        return {
            "block_sparse_moe.router.layer.weight": (count, width),
            "block_sparse_moe.input_linear.weight": (count, 2 * ffn, width),
            "block_sparse_moe.output_linear.weight": (count, width, ffn),
        }
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (count, width)}
    for expert in range(count):
        found[f"{block}.experts.{expert}.{gate}.weight"] = (ffn, width)
        found[f"{block}.experts.{expert}.{up}.weight"] = (ffn, width)
        found[f"{block}.experts.{expert}.{down}.weight"] = (width, ffn)
    if "shared_expert_intermediate_size" in config:
        shared = config["shared_expert_intermediate_size"]
        found["mlp.shared_expert_gate.weight"] = (1, width)
        found["mlp.shared_expert.gate_proj.weight"] = (shared, width)
        found["mlp.shared_expert.up_proj.weight"] = (shared, width)
        found["mlp.shared_expert.down_proj.weight"] = (width, shared)
    return found


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
        if len(shape) > 1:
            values = unit * _gain(name) * np.sqrt(3.0 / shape[-1])
        elif name.endswith("norm.weight"):
            values = 1.0 + 0.5 * unit
        else:
            values = unit
        found[name] = values.astype(np.float16).astype(np.float32)
    return found


def _gain(name: str) -> float:
    """How much larger the outputs of a matrix are than its inputs."""
    kind = name.split(".")[-2]
    if kind in ("w2", "output_linear") or (".experts." in name and kind == "down_proj"):
        return 0.15  # less and the weights of a sum of experts would not show
    # A router of gain 3 prefers some experts clearly: no choice hangs on a rounding.
    return {"o_proj": 0.05, "down_proj": 0.05, "gate": 3.0, "layer": 3.0}.get(kind, 1.0)


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
