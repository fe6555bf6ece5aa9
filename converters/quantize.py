"""From float32 weights to small integers and float16 scales.

A row is cut into groups of 32 columns; every group has one scale and a weight is about
scale * integer, the integer in -127..127 (q8), -8..7 (q4, q4s), -4..3 (q3) or -2..1 (q2); in q4m it is
scale * integer + minimum, the integer in 0..15. The scale is rounded to what is stored (float16, a byte for
q4s, q3 and q2) before the integers are chosen, so that they make up for its rounding.

q4 chooses the scale that minimises the squared error, where Q4_0 of GGUF takes the extreme / -8.
For fixed integers q the best scale is <x,q>/<q,q>, which leaves an error of |x|^2 - <x,q>^2/<q,q>;
so candidate scales need only be good enough to produce good integers. This is the search of
llama.cpp's `make_qx_quants` (ggml-quants.c), here over all groups of a slab at once.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConversionError
from edgert.kernels.packing import GROUP, LARGEST_BYTE_SCALE, byte_scales
from edgert.planner import cores

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
# As Q4_DIVISORS, for fewer steps: 3 bits clip the extreme of a group often, 2 bits nearly always.
BYTE_DIVISORS: Final = {
    "q4s": Q4_DIVISORS,
    "q3": (*np.arange(-5.5, -2.25, 0.25).tolist(), 2.5, 3.0, 3.5, 4.0),
    "q2": (*np.arange(-3.2, -0.9, 0.2).tolist(), *np.arange(1.0, 2.6, 0.2).tolist()),
}
# By what share of its range a group is narrowed at either end where q4m starts its search: the best line
# through rounded integers leaves the outermost weights beyond its ends.
NARROWINGS: Final = (0.0, 0.04, 0.08)
LINE_REFINEMENTS: Final = 2  # rounds of "best line for these integers, best integers for this line"
# Weights worked on at once. Arrays of 256 kB stay in a second-level cache; a quarter of that halves
# the speed, because calls then take longer than their work.
CHUNK_WEIGHTS: Final = 1 << 16

F16_MAX: Final = 65504.0
LARGEST: Final = {
    "f32": float(np.finfo(np.float32).max),
    "f16": F16_MAX,
    "q8": 127 * F16_MAX,
    "q4m": F16_MAX,
    "q4": 7 * F16_MAX,
    "q4s": 7 * LARGEST_BYTE_SCALE,
    "q3": 4 * LARGEST_BYTE_SCALE,
    "q2": 2 * LARGEST_BYTE_SCALE,
}
"""The largest weight each quantisation can hold."""
CODE_RANGE: Final = {
    "q8": (-127, 127),
    "q4m": (0, 15),
    "q4": (-8, 7),
    "q4s": (-8, 7),
    "q3": (-4, 3),
    "q2": (-2, 1),
}
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
            f"the source is damaged, or needs --quant {'q4' if quant in BYTE_DIVISORS else 'f32'}"
        )


def quantize(weights: Floats, quant: str, importance: Floats | None = None, name: str = "matrix") -> "Codes":
    """float32 [N, K] to whole numbers and scales; but for q8, those of least squared error.

    `importance` [K], positive, weighs the squared errors of the columns: the mean square of the
    activations they meet makes it the error of the product. Raises ConversionError as `check_weights`.
    """
    check_weights(weights, quant, name)
    count, columns = weights.shape
    values = np.empty((count, columns), np.int8)
    scales = np.empty((count, -(-columns // GROUP)), np.float32)
    minimums = np.empty_like(scales) if quant == "q4m" else None

    def fill(rows: slice) -> None:
        groups = _to_groups(weights[rows])
        weight = None
        if importance is not None:
            weight = _to_groups(np.broadcast_to(importance, weights[rows].shape))
        scale, minimum = search(groups, quant, weight)
        codes = round_codes(groups, quant, scale, minimum)
        shape = weights[rows].shape[0], -1
        values[rows] = np.ascontiguousarray(codes.astype(np.int8).T).reshape(shape)[:, :columns]
        scales[rows] = scale.reshape(shape)
        if minimums is not None and minimum is not None:
            minimums[rows] = minimum.reshape(shape)

    chunks = list(_chunks(weights))
    # NumPy lets other threads run inside its loops; each fills rows of its own.
    with ThreadPoolExecutor(max(1, min(cores(), len(chunks)))) as pool:
        list(pool.map(fill, chunks))
    return Codes(values, scales, minimums)


def search(groups: Floats, quant: str, weight: Floats | None) -> tuple[Floats, Floats | None]:
    """The scales [G] of groups [k, G], k at most 32, as they are stored, and of q4m the minimums [G].

    weight: [k, G] or [k, 1], of the squared errors; None for all the same.
    """
    if quant == "q4m":
        return _search_line(groups, weight)
    if quant == "q8":
        return _to_f16(np.abs(groups).max(axis=0) / np.float32(127)), None
    if quant == "q4":
        return _search_q4(groups, weight), None
    return _search_bytes(groups, quant, weight), None


def round_codes(weights: Floats, quant: str, scale: Floats, minimum: Floats | None) -> Floats:
    """The whole numbers of `quant` nearest to (weights - minimum) / scale, as floats; 0 for a scale of 0."""
    moved = weights if minimum is None else weights - minimum
    return _round(moved, scale, *CODE_RANGE[quant], np.empty_like(weights))


def dequantize(
    values: NDArray[np.int8],
    scales: NDArray[np.floating[Any]],
    minimums: NDArray[np.floating[Any]] | None = None,
) -> Floats:
    """int8 [N, K] with scales, and maybe minimums, [N, ceil(K/32)] back to float32 [N, K]."""
    columns = values.shape[1]
    restored = values.astype(np.float32)
    whole = columns // GROUP * GROUP
    for given, apply in ((scales, np.multiply), (minimums, np.add)):
        if given is not None:
            wide = given.astype(np.float32)
            cut = restored[:, :whole].reshape(len(values), -1, GROUP)
            restored[:, :whole] = apply(cut, wide[:, : whole // GROUP, None]).reshape(len(values), whole)
            restored[:, whole:] = apply(restored[:, whole:], wide[:, whole // GROUP :])
    return restored


@dataclass(frozen=True, slots=True)
class Codes:
    """Weights as they are stored: whole numbers, and for every 32 of a row a scale and maybe a minimum."""

    values: NDArray[np.int8]  # [N, K]
    scales: Floats  # [N, ceil(K/32)]
    minimums: Floats | None = None  # [N, ceil(K/32)], of q4m

    def floats(self) -> Floats:
        """The weights, float32 [N, K]; not finite where a damaged scale is not."""
        with np.errstate(all="ignore"):
            return dequantize(self.values, self.scales, self.minimums)

    def fit(self, quant: str) -> bool:
        """Whether `quant` holds them without loss."""
        if quant not in CODE_RANGE or (self.minimums is not None) != (quant == "q4m"):
            return False
        low, high = CODE_RANGE[quant]
        stored = [self.scales] if self.minimums is None else [self.scales, self.minimums]
        as_stored = byte_scales if quant in BYTE_DIVISORS else _to_f16
        exact = all(np.isfinite(x).all() and (as_stored(x).astype(np.float32) == x).all() for x in stored)
        return exact and bool(self.values.min() >= low and self.values.max() <= high)

    def nearest(self, quant: str) -> "Codes | None":
        """The same integers with scales and minimums rounded as q4m stores them, by at most 2**-11 of each.

        That is far less than other integers would lose. None where `quant` does not hold the integers.
        """
        if quant != "q4m" or self.minimums is None:
            return None
        rounded = Codes(self.values, _to_f16(self.scales), _to_f16(self.minimums))
        if not (np.abs(self.scales).max() <= F16_MAX and np.abs(self.minimums).max() <= F16_MAX):  # or NaN
            return None
        return rounded if rounded.fit(quant) else None


def scaled(values: Floats, factor: float, offset: float = 0.0) -> Floats:
    """(values + offset) * factor; not finite where damaged values are not, and nothing else is said of it."""
    if factor == 1 and offset == 0:
        return values
    with np.errstate(all="ignore"):
        found: Floats = (values + np.float32(offset)) * np.float32(factor)
    return found


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


def _search_q4(groups: Floats, weight: Floats | None) -> Floats:
    """[k, G] to their scales [G]."""
    extreme, inverse = _extremes(groups)
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
    found, plain = _to_f16(scale), _to_f16(extreme / np.float32(Q4_PLAIN_DIVISOR))
    other = _round(groups, plain, -8, 7, np.empty_like(groups))
    _round(groups, found, -8, 7, codes)
    better = _error(groups, other, plain, weight) < _error(groups, codes, found, weight)
    return np.where(better, plain, found)


def _extremes(groups: Floats) -> tuple[Floats, Floats]:
    """Of each group the weight of largest magnitude, and what divides by it; 0 for a group of nothing."""
    low, high = groups.min(axis=0), groups.max(axis=0)
    extreme = np.where(high > -low, high, low)
    # A group below float16's reach ends with scale 0 whatever is found here; flushing its inverse
    # keeps the search free of overflow.
    tiny = np.abs(extreme) < np.float32(2.0**-26)
    return extreme, np.divide(1, extreme, out=np.zeros_like(extreme), where=~tiny)


def _search_bytes(groups: Floats, quant: str, weight: Floats | None) -> Floats:
    """[k, G] to scales [G] of one byte.

    Steps between such scales are wide, so each candidate is judged as it would be stored.
    """
    low, high = CODE_RANGE[quant]
    _, inverse = _extremes(groups)
    codes = np.empty_like(groups)
    scale = np.zeros_like(inverse)
    least = _error(groups, np.zeros_like(groups), scale, weight)
    for divisor in BYTE_DIVISORS[quant]:
        _round_by(groups, inverse * np.float32(divisor), low, high, codes)
        candidate = byte_scales(_best_scale(groups, codes, weight)[0]).astype(np.float32)
        error = _error(groups, _round(groups, candidate, low, high, codes), candidate, weight)
        np.copyto(scale, candidate, where=error < least)
        np.minimum(least, error, out=least)
    return scale


def _search_line(groups: Floats, weight: Floats | None) -> tuple[Floats, Floats]:
    """[k, G] to scales and minimums [G] of q4m: the line through whole numbers 0..15 of least error."""
    low, high = groups.min(axis=0), groups.max(axis=0)
    share = np.ones((len(groups), 1), np.float32) if weight is None else weight
    share = np.broadcast_to(share / share.sum(axis=0), groups.shape)
    mean = np.einsum("kg,kg->g", share, groups)
    scale, minimum, codes = np.zeros_like(low), _to_f16(mean), np.zeros_like(groups)
    least = _error(groups - minimum, codes, scale, share)
    for below in NARROWINGS:
        for above in NARROWINGS:
            step = (high - low) * np.float32((1 - below - above) / 15)
            start = low + (high - low) * np.float32(below)
            for _ in range(LINE_REFINEMENTS):
                _round(groups - start, step, 0, 15, codes)
                middle = np.einsum("kg,kg->g", share, codes)
                step, _ = _best_scale(groups - mean, codes - middle, share)
                start = mean - step * middle
            step, start = _to_f16(step), _to_f16(start)
            error = _error(groups - start, _round(groups - start, step, 0, 15, codes), step, share)
            better = error < least
            np.copyto(scale, step, where=better)
            np.copyto(minimum, start, where=better)
            np.minimum(least, error, out=least)
    return scale, minimum


def _to_f16(scale: Floats) -> Floats:
    """Rounded to float16, saturated: the best scale may lie just above that of the largest weight."""
    with np.errstate(invalid="ignore"):  # a damaged file may hold a NaN
        return np.clip(scale, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)
