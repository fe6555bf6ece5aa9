"""How often neurons fire, and below which activation a share of them lies."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import Activation
from edgert.converters.hottest_first import Firing
from edgert.format.sparsity import QUANTILES

LEAST, MOST, PER_OCTAVE = -24, 8, 32
"""Bins of the histogram of log2|activation|: 2% wide each, far finer than a share of neurons can be told."""
BINS: Final = (MOST - LEAST) * PER_OCTAVE


class Firings:
    """Of one layer, from the rows its activation is applied to: an Observer. Clear it between layers.

    The threshold for a share is the quantile of |act(gate)| over all neurons of the layer (CATS, Lee et al.,
    2024, arXiv:2404.08763, section 3.2).
    """

    def __init__(self, activation: Activation) -> None:
        self._activation = activation
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._rows = 0
        self._bins = np.zeros(BINS, np.int64)
        self._zeros = 0
        self._sizes: NDArray[np.float64] | None = None  # [F] the sum of |activation|
        self._fired: NDArray[np.int64] | None = None  # [F]

    def see(self, names: tuple[str, ...], rows: NDArray[np.float32]) -> None:
        """Nothing: what matrices meet says nothing of gates."""

    def see_gates(self, layer: int, rows: NDArray[np.float32]) -> None:
        """Add the rows [R, F]."""
        size = np.abs(_activated(self._activation, rows))
        if self._sizes is None or self._fired is None:
            self._sizes, self._fired = np.zeros(rows.shape[1]), np.zeros(rows.shape[1], np.int64)
        self._rows += len(rows)
        self._sizes += size.sum(axis=0, dtype=np.float64)
        self._fired += (size > 0).sum(axis=0)
        positive = size[size > 0]
        self._zeros += size.size - positive.size
        places = np.floor((np.log2(positive) - LEAST) * PER_OCTAVE).clip(0, BINS - 1)
        self._bins += np.bincount(places.astype(np.int64), minlength=BINS)

    def result(self, share: float) -> Firing | None:
        """For a share of zeros, 0 for those that are so by themselves; None where nothing was seen."""
        if self._sizes is None or self._fired is None:
            return None
        total = self._zeros + int(self._bins.sum())
        threshold, zeros = 0.0, self._zeros / total
        if share > zeros:
            below = self._zeros + np.cumsum(self._bins)
            at = min(int(np.searchsorted(below, share * total)), BINS - 1)
            threshold, zeros = float(2.0 ** (LEAST + (at + 1) / PER_OCTAVE)), float(below[at] / total)
        often = np.quantile(self._fired / self._rows, QUANTILES)
        # Hottest first: what fires most, or weighs most where everything fires a little.
        hottest = np.argsort(-self._fired if zeros > 0 and threshold == 0 else -self._sizes, kind="stable")
        return Firing(threshold, zeros, tuple(round(float(q), 4) for q in often), hottest)


def _activated(kind: Activation, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """act(x), to the precision of a histogram."""
    if kind == "silu":
        return np.asarray(x / (1 + np.exp(-x.clip(-80, 80))), np.float32)
    if kind in ("gelu_tanh", "gelu"):  # which differ by less than a bin
        return np.asarray(0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))), np.float32)
    positive = np.maximum(x, 0)
    return positive * positive if kind == "relu2" else positive
