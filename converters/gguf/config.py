"""From the metadata of a GGUF file to the model it describes.

Keys are named after the architecture (`llama.block_count`). llama.cpp gives one name, "llama", to
every model it computes like Llama; Mistral is one of them.
"""

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import GLOBAL_ROPE, ModelSpec
from edgert.converters.architectures import Decoder
from edgert.converters.gguf.architectures import ARCHITECTURES, REFUSED, ROPE_FACTORS, Architecture, gguf_name
from edgert.converters.gguf.reader import GgufFile, GgufTensor
from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.rope import make_rope
from edgert.errors import ConversionError, NotAModelError, UnsupportedError
from edgert.format.tensors import rope_name

# The most experts of a published model are 512; for each of a layer's, three tensors are listed.
MAX_EXPERTS: Final = 1 << 12


def read_decoder(file: GgufFile, eos_ids: Iterable[int]) -> Decoder:
    """The decoder of a GGUF file; `eos_ids` end its texts.

    Raises UnsupportedError for an architecture or an option edgert does not compute, NotAModelError
    for a GGUF file of something else, ConversionError for keys that are missing or impossible.
    """
    name = _name(file)
    config, architecture = _own_keys(file, name), ARCHITECTURES[name]
    for key, neutral in REFUSED.items():
        config.refuse_unless(key, *neutral)
    experts = _expert_count(config, architecture)
    layers, width = _layers(config, file), config.integer("embedding_length")
    heads = _uniform(config, "attention.head_count")
    head_dim = _head_dim(config, max(1, width // heads))
    context = config.integer("context_length")
    rope = make_rope(_rope_parameters(config, context), head_dim, context)
    try:
        spec = ModelSpec(
            architecture=architecture.experts if experts else architecture.dense,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=_uniform(config, "attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn_width=_uniform(config, "feed_forward_length"),
            vocab=_vocab(file),
            context=rope.context,
            norm_eps=config.number("attention.layer_norm_rms_epsilon"),
            tied_embeddings=gguf_name("output") not in file.tensors,
            qkv_bias=_has(file, "q_bias"),
            output_bias=_has(file, "o_bias"),
            ffn_bias=_has(file, "gate_bias"),
            qk_norm=architecture.qk_norm,
            joint_qk_norm=architecture.joint_qk_norm,
            windows=_windows(config, name, layers, rope.context),
            experts=experts,
            active_experts=config.integer("expert_used_count") if experts else 0,
            expert_width=_rows(file, "blk.0.ffn_gate_exps.weight") if experts else 0,
            shared_width=_rows(file, gguf_name("layers.0.shared_gate")) if experts else 0,
            normalized_routing=experts > 0 and architecture.normalized,
            rope_theta=rope.theta,
            rope_scaling=rope.kind,
            rope_magnitude=rope.magnitude,
            bos_id=_bos_id(file),
            eos_ids=tuple(eos_ids),
        )
    except ValueError as error:
        raise ConversionError(f"{config.where}: {error}; download the file again") from None
    return Decoder(spec, {rope_name(GLOBAL_ROPE): _divided(rope.frequencies, file)})


def _name(file: GgufFile) -> str:
    found = HfConfig(file.metadata, str(file.path))
    kind = found.text("general.type", "model")
    if kind != "model":
        raise NotAModelError(
            f"{file.path}: found a GGUF file of type {shown(kind)}, expected model; convert the model itself"
        )
    name = found.text("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{file.path}: found architecture {shown(name)}, expected one of {', '.join(ARCHITECTURES)}; "
            "convert a model of a supported architecture"
        )
    return name


def _own_keys(file: GgufFile, name: str) -> HfConfig:
    """The architecture's keys without its name."""
    prefix = f"{name}."
    values = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return HfConfig(plain, f"{file.path}: {name}")


def _expert_count(config: HfConfig, architecture: Architecture) -> int:
    """How many experts a layer has, 0 for none; refused for an architecture that is never so."""
    count = config.integer("expert_count", 0, least=0, most=MAX_EXPERTS)
    if bool(count) != bool(architecture.experts) and not (architecture.dense and architecture.experts):
        expected = "some" if architecture.experts else "none"
        raise UnsupportedError(
            f"{config.where}: found expert_count {count}, expected {expected} for this architecture; "
            "convert another model"
        )
    if count:
        config.refuse_unless("expert_weights_norm", architecture.normalized)
    return count


def _rows(file: GgufFile, name: str) -> int:
    """The rows of a tensor's matrices, 0 if it is not in the file."""
    tensor = file.tensors.get(name)
    return tensor.shape[-2] if tensor and len(tensor.shape) > 1 else 0


def _layers(config: HfConfig, file: GgufFile) -> int:
    """No more than the file can hold: what comes next makes lists of so many."""
    layers = config.integer("block_count")
    if layers > len(file.tensors):
        raise ConversionError(
            f"{config.where}: found block_count {layers}, expected no more than the {len(file.tensors)} "
            "tensors of the file; download the file again"
        )
    return layers


def _vocab(file: GgufFile) -> int:
    """A row of the embedding for every token; there may be more rows."""
    rows, tokens = _embedding(file).shape[0], file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ConversionError(
            f"{file.path}: found {len(tokens)} tokens and token_embd.weight of {rows} rows, "
            "expected a row for each; download the file again"
        )
    return rows


def _embedding(file: GgufFile) -> GgufTensor:
    tensor = file.tensors.get(gguf_name("token_embedding"))
    if tensor is None or len(tensor.shape) != 2:
        found = f"{list(tensor.shape)}" if tensor else "none"
        raise ConversionError(
            f"{file.path}: found {found} for token_embd.weight, expected a matrix; "
            "convert a file that holds a whole model"
        )
    return tensor


def _has(file: GgufFile, part: str) -> bool:
    return gguf_name(f"layers.0.{part}") in file.tensors


def _uniform(config: HfConfig, key: str, default: int | None = None) -> int:
    """A number that some architectures give for each layer; edgert has one for all."""
    value = config.values.get(key)
    if not isinstance(value, list):
        return config.integer(key, default)
    if any(item != value[0] for item in value):
        raise UnsupportedError(
            f"{config.where}: found {key} {shown(value)}, expected one number for all layers; "
            "convert another model"
        )
    return HfConfig(dict.fromkeys([key], *value[:1]), config.where).integer(key, default)


def _head_dim(config: HfConfig, default: int) -> int:
    """Keys, values and rotated dimensions are of one size in what edgert computes."""
    head_dim = config.integer("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if config.integer(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"{config.where}: found {key} {config.values[key]} where keys take {head_dim}, "
                "expected the same; convert another model"
            )
    return head_dim


def _rope_parameters(config: HfConfig, context: int) -> HfConfig:
    """The rotary embedding under the names of Hugging Face, whose rules are the same."""
    kind = config.text("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"{config.where}: found rope.scaling.type {shown(kind)}, expected none, linear or yarn; "
            "convert another model"
        )
    theta = config.number("rope.freq_base", 10000.0)
    where = f"{config.where}: rope"
    if kind == "none":
        return HfConfig({"rope_type": "default", "rope_theta": theta}, where)
    factor = config.number("rope.scaling.factor", 1.0)
    values: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        # ggml's rope_yarn multiplies attn_factor by YaRN's own 0.1 ln(factor) + 1.
        magnitude = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        values |= {
            "original_max_position_embeddings": config.integer(
                "rope.scaling.original_context_length", context
            ),
            "beta_fast": config.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": config.number("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": magnitude * config.number("rope.scaling.attn_factor", 1.0),
        }
    return HfConfig(values, where)


def _divided(frequencies: NDArray[np.float32], file: GgufFile) -> NDArray[np.float32]:
    """The frequencies over the factors of the file, if it has any."""
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is None:
        return frequencies
    readable = factors.shape == frequencies.shape and factors.kind.decode
    values = factors.vector() if readable else np.empty(0, np.float32)
    if not (values.shape == frequencies.shape and (values > 0).all() and np.isfinite(values).all()):
        raise ConversionError(
            f"{file.path}: found {ROPE_FACTORS} of shape {list(factors.shape)} in {factors.kind.name}, "
            f"expected {len(frequencies)} numbers > 0; download the file again"
        )
    divided: NDArray[np.float32] = frequencies / values
    return divided


def _windows(config: HfConfig, name: str, layers: int, context: int) -> tuple[int, ...]:
    """Mistral's window, in every layer. Which layers of Qwen have one is not in the file."""
    size = config.integer("attention.sliding_window", 0, least=0)
    if size == 0 or size >= context:
        return ()
    if name != "llama":
        raise UnsupportedError(
            f"{config.where}: found attention.sliding_window {size} below the context of {context}, "
            "expected none, for the file does not say which layers have it; convert the Hugging Face folder"
        )
    return (size,) * layers


def _bos_id(file: GgufFile) -> int | None:
    found = HfConfig(file.metadata, str(file.path))
    key = "tokenizer.ggml.bos_token_id"
    return found.integer(key, least=0) if found.has(key) else None
