"""From float32 weights to small integers and float16 scales.

A row is cut into groups of 32 columns; every group has one scale and a weight is about
scale * integer, the integer in -127..127 (q8) or -8..7 (q4). The scale is rounded to float16
before the integers are chosen, so that they make up for its rounding.

q4 chooses the scale that minimises the squared error, where Q4_0 of GGUF takes the extreme / -8.
For fixed integers q the best scale is <x,q>/<q,q>, which leaves an error of |x|^2 - <x,q>^2/<q,q>;
so candidate scales need only be good enough to produce good integers. This is the search of
llama.cpp's `make_qx_quants` (ggml-quants.c), here over all groups of a slab at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConversionError
from edgert.kernels.packing import GROUP

Floats = NDArray[np.float32]

# Candidate scales are extreme / divisor, the extreme being the weight of largest magnitude, with
# its sign. Negative divisors put it on the side with eight steps, where it nearly always belongs.
# On Gaussian and Laplacian weights these 18 come within 0.04 % of the error of 320 candidates.
Q4_DIVISORS: Final = (*np.arange(-10.0, -6.25, 0.25).tolist(), 7.0, 7.5, 8.0)
# The scale of plain Q4_0. Kept to the end, so that no group is worse than there.
Q4_PLAIN_DIVISOR: Final = -8.0
# Rounds of "best scale for these integers, best integers for this scale" after the search; each
# lowers the error. A second one gains less than 0.01 %.
Q4_REFINEMENTS: Final = 1
# Weights worked on at once. Arrays of 256 kB stay in a second-level cache; a quarter of that halves
# the speed, because calls then take longer than their work.
CHUNK_WEIGHTS: Final = 1 << 16

F16_MAX: Final = 65504.0
LARGEST: Final = {
    "f32": float(np.finfo(np.float32).max),
    "f16": F16_MAX,
    "q8": 127 * F16_MAX,
    "q4": 7 * F16_MAX,
}
"""The largest weight each quantisation can hold."""
CODE_RANGE: Final = {"q8": (-127, 127), "q4": (-8, 7)}
"""The integers of each quantisation that has a scale."""


def check_weights(weights: Floats, quant: str, name: str) -> None:
    """Raise ConversionError, naming the tensor, for NaN, infinity, or a weight `quant` cannot hold."""
    peak = float(np.abs(weights).max(initial=0))  # NaN propagates through max
    if not np.isfinite(peak):
        raise ConversionError(
            f"{name}: found NaN or infinity, expected finite weights; "
            "the source is damaged, download it again"
        )
    if peak > LARGEST[quant]:
        raise ConversionError(
            f"{name}: found a weight of {peak:.3g}, expected at most {LARGEST[quant]:.6g} for {quant}; "
            "the source is damaged, or needs --quant f32"
        )


def quantize_q8(weights: Floats, name: str = "matrix") -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """float32 [N, K] to int8 [N, K] in -127..127 and scales [N, ceil(K/32)].

    The scale is the largest magnitude of the group / 127. Raises ConversionError as `check_weights`.
    """
    check_weights(weights, "q8", name)
    values, scales = _outputs(weights)
    for rows in _chunks(weights):
        groups = _to_groups(weights[rows])
        scale = (np.abs(groups).max(axis=0) / np.float32(127)).astype(np.float16)
        codes = _round(groups, scale.astype(np.float32), -127, 127, np.empty_like(groups))
        values[rows], scales[rows] = _from_groups(codes, scale, weights[rows].shape)
    return values, scales


def quantize_q4(
    weights: Floats, importance: Floats | None = None, name: str = "matrix"
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """float32 [N, K] to int8 [N, K] in -8..7 and scales [N, ceil(K/32)], of least squared error.

    `importance` [K], positive, weighs the squared errors of the columns: the mean square of the
    activations they meet makes it the error of the product. Raises ConversionError as
    `check_weights`.
    """
    check_weights(weights, "q4", name)
    values, scales = _outputs(weights)
    for rows in _chunks(weights):
        groups = _to_groups(weights[rows])
        weight = None
        if importance is not None:
            weight = _to_groups(np.broadcast_to(importance, weights[rows].shape))
        codes, scale = _search_q4(groups, weight)
        values[rows], scales[rows] = _from_groups(codes, scale, weights[rows].shape)
    return values, scales


def search_q4(groups: Floats, weight: Floats | None) -> NDArray[np.float16]:
    """The scales [G] of groups [k <= 32, G] whose errors are weighed by `weight` [k, G] or [k, 1]."""
    return _search_q4(groups, weight)[1]


def round_codes(weights: Floats, scale: Floats, quant: str) -> Floats:
    """The integers of `quant` nearest to weights / scale, as floats; 0 where the scale is 0."""
    return _round(weights, scale, *CODE_RANGE[quant], np.empty_like(weights))


def dequantize(values: NDArray[np.int8], scales: NDArray[np.floating[Any]]) -> Floats:
    """int8 [N, K] and scales [N, ceil(K/32)] back to float32 [N, K]."""
    columns = values.shape[1]
    restored = values.astype(np.float32)
    whole = columns // GROUP * GROUP
    wide = scales.astype(np.float32)
    cut = restored[:, :whole].reshape(len(values), -1, GROUP)
    restored[:, :whole] = (cut * wide[:, : whole // GROUP, None]).reshape(len(values), whole)
    restored[:, whole:] *= wide[:, whole // GROUP :]
    return restored


@dataclass(frozen=True, slots=True)
class Codes:
    """Weights that a source stores as we do: small integers, and one scale for every 32 of a row."""

    values: NDArray[np.int8]  # [N, K]
    scales: Floats  # [N, ceil(K/32)]

    def floats(self) -> Floats:
        """The weights, float32 [N, K]; not finite where a damaged scale is not."""
        with np.errstate(all="ignore"):
            return dequantize(self.values, self.scales)

    def fit(self, quant: str) -> bool:
        """Whether `quant` holds them without loss."""
        if quant not in CODE_RANGE:
            return False
        low, high = CODE_RANGE[quant]
        with np.errstate(over="ignore"):
            exact = self.scales.astype(np.float16).astype(np.float32) == self.scales  # not so for a NaN
        whole = bool(np.isfinite(self.scales).all() and exact.all())
        return whole and bool(self.values.min() >= low and self.values.max() <= high)


@dataclass(slots=True)
class Distortion:
    """The rounding error of a tensor, summed slab by slab in float64."""

    error: float = 0.0  # sum of squared differences
    energy: float = 0.0  # sum of squared weights

    def add(self, original: Floats, restored: Floats) -> None:
        """Add a slab; both are of the same shape."""
        # Rows in float32 are short enough to sum exactly enough; only their totals need float64.
        difference = original - restored
        self.error += float(np.einsum("nk,nk->n", difference, difference).sum(dtype=np.float64))
        self.energy += float(np.einsum("nk,nk->n", original, original).sum(dtype=np.float64))

    @property
    def relative(self) -> float:
        """RMS error over RMS weight; 0 for a tensor of zeros kept as zeros."""
        return float(np.sqrt(self.error / self.energy)) if self.energy else float(self.error > 0)


def relative_error(original: Floats, restored: Floats) -> float:
    """RMS of the differences of two float32 [N, K] over the RMS of the first."""
    distortion = Distortion()
    distortion.add(original, restored)
    return distortion.relative


def _outputs(weights: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    rows, columns = weights.shape
    return np.empty((rows, columns), np.int8), np.empty((rows, -(-columns // GROUP)), np.float16)


def _chunks(weights: Floats) -> Iterator[slice]:
    rows, columns = weights.shape
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _to_groups(weights: Floats) -> Floats:
    """[N, K] to [32, groups], zeros after K: sums over a group then run along whole vectors."""
    rows, columns = weights.shape
    padded = -(-columns // GROUP) * GROUP
    if padded != columns:
        whole = np.zeros((rows, padded), np.float32)
        whole[:, :columns] = weights
        weights = whole
    return np.ascontiguousarray(weights.reshape(-1, GROUP).T)


def _from_groups(
    codes: Floats, scale: NDArray[np.float16], shape: tuple[int, ...]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    rows, columns = shape
    values = np.ascontiguousarray(codes.astype(np.int8).T).reshape(rows, -1)
    return values[:, :columns], scale.reshape(rows, -1)


def _round(groups: Floats, scale: Floats, low: int, high: int, out: Floats) -> Floats:
    """The integers nearest to groups / scale, in low..high; 0 where the scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return _round_by(groups, inverse, low, high, out)


def _round_by(groups: Floats, inverse: Floats, low: int, high: int, out: Floats) -> Floats:
    np.multiply(groups, inverse, out=out)
    np.rint(out, out=out)
    return np.clip(out, low, high, out=out)


def _best_scale(groups: Floats, codes: Floats, weight: Floats | None) -> tuple[Floats, Floats]:
    """For fixed integers the scale <x,q>/<q,q> of least error, and by how much it lowers |x|^2."""
    weighted = codes if weight is None else codes * weight
    along = np.einsum("kg,kg->g", weighted, groups)
    length = np.einsum("kg,kg->g", weighted, codes)
    scale = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
    return scale, scale * along


def _error(groups: Floats, codes: Floats, scale: Floats, weight: Floats | None) -> Floats:
    difference = codes * scale
    np.subtract(groups, difference, out=difference)
    weighted = difference if weight is None else difference * weight
    total: Floats = np.einsum("kg,kg->g", weighted, difference)
    return total


def _search_q4(groups: Floats, weight: Floats | None) -> tuple[Floats, NDArray[np.float16]]:
    """[32, G] to integers [32, G] (as floats) and their scales [G]."""
    low, high = groups.min(axis=0), groups.max(axis=0)
    extreme = np.where(high > -low, high, low)
    # A group below float16's reach ends with scale 0 whatever is found here; flushing its inverse
    # keeps the search free of overflow.
    tiny = np.abs(extreme) < np.float32(2.0**-26)
    inverse = np.divide(1, extreme, out=np.zeros_like(extreme), where=~tiny)
    codes = np.empty_like(groups)
    scale = np.zeros_like(extreme)
    gain = np.zeros_like(extreme)
    for divisor in Q4_DIVISORS:
        _round_by(groups, inverse * np.float32(divisor), -8, 7, codes)
        candidate, lowered = _best_scale(groups, codes, weight)
        np.copyto(scale, candidate, where=lowered > gain)
        np.maximum(gain, lowered, out=gain)
    for _ in range(Q4_REFINEMENTS):
        scale, _gain = _best_scale(groups, _round(groups, scale, -8, 7, codes), weight)
    found = _to_f16(scale)
    plain = _to_f16(extreme / np.float32(Q4_PLAIN_DIVISOR))
    other = _round(groups, plain.astype(np.float32), -8, 7, np.empty_like(groups))
    _round(groups, found.astype(np.float32), -8, 7, codes)
    better = _error(groups, other, plain.astype(np.float32), weight) < _error(
        groups, codes, found.astype(np.float32), weight
    )
    np.copyto(codes, other, where=better)
    return codes, np.where(better, plain, found)


def _to_f16(scale: Floats) -> NDArray[np.float16]:
    """Rounded to float16, saturated: the best scale may lie just above that of the largest weight."""
    return np.clip(scale, -F16_MAX, F16_MAX).astype(np.float16)
