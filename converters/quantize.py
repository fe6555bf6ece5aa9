"""From float32 weights to small integers and float16 scales.

A row is cut into groups of 32 columns; every group has one scale and a weight is about
scale * integer, the integer in -127..127 (q8), -8..7 (q4, q4s), -4..3 (q3) or -2..1 (q2); in q4m it is
scale * integer + minimum, the integer in 0..15. q4 chooses the scale that minimises the squared error, where
Q4_0 of GGUF takes the extreme / -8. The searches are kernels (kernels/rounding.py); among which candidates,
is said here.
"""

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConversionError
from edgert.kernels import rounding
from edgert.kernels.packing import BLOCK, GROUP, LARGEST_BYTE_SCALE, byte_scales
from edgert.kernels.reference.rounding import F16_MAX, GAIN, LINE, PEAK, STORED

Floats = NDArray[np.float32]

# Candidate scales are extreme / divisor, the extreme being the weight of largest magnitude, with
# its sign. Negative divisors put it on the side with eight steps, where it nearly always belongs.
# On Gaussian and Laplacian weights these 18 come within 0.04 % of the error of 320 candidates.
Q4_DIVISORS: Final = (*np.arange(-10.0, -6.25, 0.25).tolist(), 7.0, 7.5, 8.0)
# As Q4_DIVISORS, for fewer steps: 3 bits clip the extreme of a group often, 2 bits nearly always.
Q3_DIVISORS: Final = (*np.arange(-5.5, -2.25, 0.25).tolist(), 2.5, 3.0, 3.5, 4.0)
Q2_DIVISORS: Final = (*np.arange(-3.2, -0.9, 0.2).tolist(), *np.arange(1.0, 2.6, 0.2).tolist())
# By what share of its range a group is narrowed at either end where q4m starts its search: the best line
# through rounded integers leaves the outermost weights beyond its ends.
NARROWINGS: Final = (0.0, 0.04, 0.08)
# Steps and starts of the lines, as shares of the range.
LINES: Final = [((1 - below - above) / 15, below) for below in NARROWINGS for above in NARROWINGS]
# Weights in one call of a kernel; its NumPy twin needs some ten times as many bytes.
CHUNK_WEIGHTS: Final = 1 << 17


class Search(NamedTuple):
    """How the scales of a quantisation are found: see kernels/reference/rounding.py."""

    how: int
    low: np.float32
    high: np.float32
    candidates: Floats

    @classmethod
    def of(cls, how: int, low: int, high: int, candidates: Any = ()) -> "Search":
        """With the types of numbers that kernels are compiled for."""
        return cls(how, np.float32(low), np.float32(high), np.array(candidates, np.float32).reshape(-1))


SEARCHES: Final = {
    "q8": Search.of(PEAK, -127, 127),
    "q4m": Search.of(LINE, 0, 15, LINES),
    "q4": Search.of(GAIN, -8, 7, Q4_DIVISORS),
    "q4s": Search.of(STORED, -8, 7, Q4_DIVISORS),
    "q3": Search.of(STORED, -4, 3, Q3_DIVISORS),
    "q2": Search.of(STORED, -2, 1, Q2_DIVISORS),
}
"""Of each quantisation that has a scale."""
CODE_RANGE: Final = {quant: (int(search.low), int(search.high)) for quant, search in SEARCHES.items()}
"""The integers of each of them."""
BYTE_SCALED: Final = tuple(quant for quant, search in SEARCHES.items() if search.how == STORED)

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


def check_weights(weights: Floats, quant: str, name: str) -> None:
    """Raise ConversionError, naming the tensor, for NaN, infinity, or a weight `quant` cannot hold."""
    # NaN propagates; without a copy, as np.abs(weights) would be.
    peak = float(np.maximum(weights.max(initial=0), -weights.min(initial=0)))
    if not np.isfinite(peak):
        raise ConversionError(
            f"{name}: found NaN or infinity, expected finite weights; "
            "the source is damaged, download it again"
        )
    if peak > LARGEST[quant]:
        raise ConversionError(
            f"{name}: found a weight of {peak:.3g}, expected at most {LARGEST[quant]:.6g} for {quant}; "
            f"the source is damaged, or needs --quant {'q4' if quant in BYTE_SCALED else 'f32'}"
        )


def quantize(weights: Floats, quant: str, importance: Floats | None = None, name: str = "matrix") -> "Codes":
    """float32 [N, K] to whole numbers and scales; but for q8, those of least squared error.

    `importance` [K], positive, weighs the squared errors of the columns: the mean square of the
    activations they meet makes it the error of the product. Raises ConversionError as `check_weights`.
    """
    return measured(weights, quant, importance, name)[0]


def measured(
    weights: Floats, quant: str, importance: Floats | None = None, name: str = "matrix"
) -> tuple["Codes", "Distortion"]:
    """As `quantize`, and what is lost."""
    check_weights(weights, quant, name)
    rows, columns = weights.shape
    groups = -(-columns // GROUP)
    weight = np.ones(groups * GROUP, np.float32)
    if importance is not None:
        weight[:] = 0
        weight[:columns] = importance
    if quant == "q4m":
        weight = _shares(weight.reshape(groups, GROUP)).reshape(-1)
    values = np.empty((rows, columns), np.int8)
    scales, minimums = np.empty((2, rows, groups), np.float32)
    sums = np.empty((-(-rows // BLOCK), 2))
    # A kernel is compiled for each kind of array, and one that must not be written to is another kind.
    weights = np.require(weights, np.float32, ["C", "W"])
    step = max(1, CHUNK_WEIGHTS // (columns * BLOCK)) * BLOCK
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = values[part], scales[part], minimums[part]
        of_part = sums[start // BLOCK : -(-part.stop // BLOCK)]
        rounding.round_rows(*SEARCHES[quant], weights[part], weight, *found, of_part)
    error, energy = sums.sum(axis=0)
    codes = Codes(values, scales, minimums if quant == "q4m" else None)
    return codes, Distortion(float(error), float(energy))


def search_into(groups: Floats, quant: str, weight: Floats, scales: Floats, minimums: Floats) -> None:
    """The scales [G] of groups [k, G], k at most 32, G whole blocks, as they are stored; and minimums [G].

    weight: [k], of the squared errors. The minimums are zeros for all but q4m.
    """
    weight = np.ascontiguousarray(_shares(weight) if quant == "q4m" else weight, np.float32)
    rounding.search_groups(*SEARCHES[quant], groups, weight, scales, minimums)


def _shares(weight: Floats) -> Floats:
    """Weights [.., 32] as shares of their sum."""
    total = weight.sum(axis=-1, keepdims=True)
    shares: Floats = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return shares


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
        as_stored = byte_scales if quant in BYTE_SCALED else _to_f16
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

    def include(self, other: "Distortion") -> None:
        """Add what another part of the tensor lost."""
        self.error += other.error
        self.energy += other.energy

    @property
    def relative(self) -> float:
        """RMS error over RMS weight; 0 for a tensor of zeros kept as zeros."""
        return float(np.sqrt(self.error / self.energy)) if self.energy else float(self.error > 0)


def relative_error(original: Floats, restored: Floats) -> float:
    """RMS of the differences of two float32 [N, K] over the RMS of the first."""
    distortion = Distortion()
    distortion.add(original, restored)
    return distortion.relative


def _to_f16(scale: Floats) -> Floats:
    """Rounded to float16, saturated: the best scale may lie just above that of the largest weight."""
    with np.errstate(invalid="ignore"):  # a damaged file may hold a NaN
        return np.clip(scale, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)
