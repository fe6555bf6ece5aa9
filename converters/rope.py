"""Rotary position embedding: from a scaling rule of Hugging Face to frequencies.

A pair of dimensions (i, i + d/2) of a head at position p is turned by p * frequency[i]; cos and sin
are multiplied by one magnitude. Every rule below is a way to stretch the frequencies of RoPE
(arXiv:2104.09864, section 3.2.2) over contexts longer than those trained on.

The formulas and the places of rounding are those of `ROPE_INIT_FUNCTIONS` in transformers'
modeling_rope_utils.py. Powers are taken in float64 and rounded once, so that frequencies do not
depend on the machine that converts; transformers' own, from float32 powers, are within two units
of the last place of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import ConversionError, UnsupportedError

Floats = NDArray[np.float32]

# Published heads have up to 576 values; frequencies are made for half of what a config claims.
MAX_HEAD_DIM: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Rope:
    """What a model's rotary embedding is, after scaling."""

    kind: str  # the rope_type
    theta: float
    frequencies: Floats  # [d/2], radians per position
    magnitude: float  # multiplies cos and sin
    context: int  # positions it was made for


def make_rope(parameters: HfConfig, head_dim: int, positions: int) -> Rope:
    """The rotary embedding of `rope_parameters` (with rope_theta and rope_type in it).

    `head_dim` is d; `positions` is max_position_embeddings. Raises UnsupportedError for a rule
    edgert does not have, ConversionError for parameters that are missing or impossible.
    """
    kind = parameters.text("rope_type", "default")
    if kind not in _RULES:
        raise UnsupportedError(
            f"{parameters.where}: found rope_type {shown(kind)}, expected one of {', '.join(_RULES)}; "
            "convert another version of the model"
        )
    parameters.refuse_unless("mrope_section")
    theta = parameters.number("rope_theta", 10000.0)
    if theta <= 1:
        raise ConversionError(
            f"{parameters.where}: found rope_theta {theta}, expected a number > 1; "
            "download the model's files again"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ConversionError(
            f"{parameters.where}: found heads of {head_dim:,} values, expected at most {MAX_HEAD_DIM:,}; "
            "download the model's files again"
        )
    wavelengths = _wavelengths(theta, head_dim)
    frequencies, magnitude = _RULES[kind](parameters, wavelengths, positions)
    if not (np.isfinite(frequencies).all() and math.isfinite(magnitude)):
        raise ConversionError(
            f"{parameters.where}: found {shown(dict(parameters.values))}, which gives infinite frequencies; "
            "download the model's files again"
        )
    context = positions
    if kind == "yarn":  # model cards say to add the rule and leave max_position_embeddings alone
        stretched = parameters.integer("original_max_position_embeddings", positions) * _factor(parameters)
        context = max(positions, int(stretched))
    if kind in ("longrope", "su"):
        context = parameters.integer("original_max_position_embeddings", positions)
    return Rope(kind, theta, frequencies, magnitude, context)


def _wavelengths(theta: float, head_dim: int) -> Floats:
    """[d/2]: positions per radian, theta ** (2i / d)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wide: NDArray[np.float64] = np.power(theta, exponents.astype(np.float64))
    return wide.astype(np.float32)


def _factor(parameters: HfConfig) -> float:
    return parameters.number("factor")


def _default(_parameters: HfConfig, wavelengths: Floats, _positions: int) -> tuple[Floats, float]:
    # Also "dynamic": it changes theta only beyond max_position_embeddings, where edgert's context
    # ends, so within it the two are equal.
    return np.float32(1) / wavelengths, 1.0


def _linear(parameters: HfConfig, wavelengths: Floats, _positions: int) -> tuple[Floats, float]:
    """Positional interpolation, arXiv:2306.15595."""
    return np.float32(1) / wavelengths / _factor(parameters), 1.0


def _llama3(parameters: HfConfig, wavelengths: Floats, positions: int) -> tuple[Floats, float]:
    """Llama 3.1: long waves are stretched, short ones kept, those between interpolated."""
    factor = _factor(parameters)
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if not low < high:
        raise ConversionError(
            f"{parameters.where}: found low_freq_factor {low} and high_freq_factor {high}, "
            "expected the first below the second; download the model's files again"
        )
    original = parameters.integer("original_max_position_embeddings", positions)
    frequencies = np.float32(1) / wavelengths
    turns = np.float32(1) / frequencies * (2 * math.pi)  # positions per full turn
    stretched = np.where(turns > original / low, frequencies / factor, frequencies)
    smooth = (np.float32(1) / turns * original - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    is_between = (turns >= original / high) & (turns <= original / low)
    return np.where(is_between, between, stretched), 1.0


def _yarn(parameters: HfConfig, wavelengths: Floats, positions: int) -> tuple[Floats, float]:
    """YaRN, arXiv:2309.00071, section 3.2: a ramp over dimensions from kept to stretched."""
    factor = _factor(parameters)
    dim = 2 * len(wavelengths)
    low, high = _yarn_range(parameters, dim, positions)
    if low == high:
        high += 0.001  # as in transformers: no division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    frequencies = np.float32(1) / (factor * wavelengths) * (1 - kept) + np.float32(1) / wavelengths * kept
    return frequencies, _yarn_magnitude(parameters, factor)


def _yarn_range(parameters: HfConfig, dim: int, positions: int) -> tuple[float, float]:
    """The first and last dimension of the ramp: those that turn beta_fast and beta_slow times."""
    original = parameters.integer("original_max_position_embeddings", positions)
    theta = parameters.number("rope_theta", 10000.0)

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.number("beta_fast", 32.0))
    high = dimension(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def yarn_scale(factor: float, multiplier: float = 1.0) -> float:
    """How much longer contexts scale scores, or their square does: YaRN's section 3.3 with a multiplier."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _yarn_magnitude(parameters: HfConfig, factor: float) -> float:
    """The attention factor; YaRN's section 3.3 gives 0.1 ln(factor) + 1."""
    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")
    # DeepSeek's variant; 0 counts as absent, as it does in transformers.
    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        above, below = parameters.number("mscale"), parameters.number("mscale_all_dim")
        return yarn_scale(factor, above) / yarn_scale(factor, below)
    return yarn_scale(factor)


def _longrope(parameters: HfConfig, wavelengths: Floats, positions: int) -> tuple[Floats, float]:
    """LongRoPE, arXiv:2402.13753: a factor for each frequency, others beyond the context trained on.

    Which of the two lists serves depends on how many positions a text will have; only the first is here,
    whose context is `original_max_position_embeddings`.
    """
    original = parameters.integer("original_max_position_embeddings", positions, least=2)
    stretches = parameters.values.get("short_factor")
    if not (isinstance(stretches, list) and len(stretches) == len(wavelengths)) or not all(
        type(s) in (int, float) and 0 < s < 1e6 for s in stretches
    ):
        raise ConversionError(
            f"{parameters.where}: found short_factor {shown(stretches)}, expected {len(wavelengths)} "
            "numbers > 0; download the model's files again"
        )
    factor = parameters.number("factor", positions / original)
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    stretched = np.array(stretches, np.float32) * wavelengths
    return np.float32(1) / stretched, parameters.number("attention_factor", magnitude)


_RULES: dict[str, Callable[[HfConfig, Floats, int], tuple[Floats, float]]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its first name
}
