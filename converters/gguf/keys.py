"""What the keys and tensors of a GGUF file say, checked and bounded, for every architecture."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.converters.gguf.architectures import ROPE_FACTORS, gguf_name
from edgert.converters.gguf.reader import GgufFile, GgufTensor
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import ConversionError, UnsupportedError


def own_keys(file: GgufFile, name: str) -> HfConfig:
    """The architecture's keys without its name."""
    prefix = f"{name}."
    values = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return HfConfig(plain, f"{file.path}: {name}")


def rows_of(file: GgufFile, name: str) -> int:
    """The rows of a tensor's matrices, 0 if it is not in the file."""
    tensor = file.tensors.get(name)
    return tensor.shape[-2] if tensor and len(tensor.shape) > 1 else 0


def layer_count(config: HfConfig, file: GgufFile) -> int:
    """No more than the file can hold: what comes next makes lists of so many."""
    layers = config.integer("block_count")
    if layers > len(file.tensors):
        raise ConversionError(
            f"{config.where}: found block_count {layers}, expected no more than the {len(file.tensors)} "
            "tensors of the file; download the file again"
        )
    return layers


def vocab(file: GgufFile) -> int:
    """A row of the embedding for every token; there may be more rows."""
    rows, tokens = embedding(file).shape[0], file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ConversionError(
            f"{file.path}: found {len(tokens)} tokens and token_embd.weight of {rows} rows, "
            "expected a row for each; download the file again"
        )
    return rows


def embedding(file: GgufFile) -> GgufTensor:
    """The token embedding, a matrix."""
    tensor = file.tensors.get(gguf_name("token_embedding"))
    if tensor is None or len(tensor.shape) != 2:
        found = f"{list(tensor.shape)}" if tensor else "none"
        raise ConversionError(
            f"{file.path}: found {found} for token_embd.weight, expected a matrix; "
            "convert a file that holds a whole model"
        )
    return tensor


def has(file: GgufFile, part: str) -> bool:
    """Whether the first layer has a tensor of ours."""
    return gguf_name(f"layers.0.{part}") in file.tensors


def uniform(config: HfConfig, key: str, default: int | None = None) -> int:
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


def head_dim(config: HfConfig, default: int, partial: bool = False) -> int:
    """Keys and values, and what is rotated but where it may be `partial`, are of one size in edgert."""
    head_dim = config.integer("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count")[: 1 if partial else 2]:
        if config.integer(key, head_dim) != head_dim:
            raise UnsupportedError(
                f"{config.where}: found {key} {config.values[key]} where keys take {head_dim}, "
                "expected the same; convert another model"
            )
    return head_dim


def rope_parameters(config: HfConfig, context: int) -> HfConfig:
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


def bos_id(file: GgufFile) -> int | None:
    """The token that begins texts, if the file names one."""
    found = HfConfig(file.metadata, str(file.path))
    key = "tokenizer.ggml.bos_token_id"
    return found.integer(key, least=0) if found.has(key) else None


def divided(frequencies: NDArray[np.float32], file: GgufFile) -> NDArray[np.float32]:
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
