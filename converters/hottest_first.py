"""A model whose neurons stand in the order of how often they fire, and what its file says of that.

Which neurons fire together is hardly more than which fire often (PowerInfer-2, section 3.1): sorted, the
clusters at the end are silent as a whole for many tokens, and not even the scales of their down are read.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.converters.quantize import Codes
from edgert.format.sparsity import SPARSITY_KEY, SparsityCalibration


@dataclass(frozen=True, slots=True)
class Firing:
    """What a calibration counted in one layer."""

    threshold: float  # activations below it are taken for zero; 0: only zeros are
    zeros: float  # share of activations that are zero then
    quantiles: tuple[float, ...]  # how often neurons fire, at `format.sparsity.QUANTILES` of them
    hottest: NDArray[np.int64]  # [F] the neurons, those that fire most first


class FiringSource(Protocol):
    """The part of a Calibration that knows of neurons."""

    def firing(self, layer: int) -> Firing | None:
        """How often the neurons of a layer fire."""

    def gram(self, name: str) -> NDArray[np.float32] | None:
        """The mean of x x^T over the rows that a matrix met."""


class _Source(Protocol):
    """A WeightSource (pipeline.py)."""

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix in slabs of rows."""

    def vector(self, name: str) -> NDArray[np.float32]:
        """A vector."""

    def stored_as(self, name: str) -> str:
        """The source's own name for the type of a tensor."""


class HottestFirst:
    """A WeightSource and the Gram matrices of a calibration, with the neurons of every layer reordered.

    One matrix of a feed-forward is held whole while it is read.
    """

    def __init__(self, source: _Source, calibration: FiringSource) -> None:
        self._source, self._calibration = source, calibration

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix in slabs of rows."""
        order, kind = self._order(name), name.split(".")[-1]
        if order is None or kind not in ("gate", "up", "down", "predictor_out"):
            yield from self._source.rows(name, slab_rows)
            return
        slabs = (s.floats() if isinstance(s, Codes) else s for s in self._source.rows(name, slab_rows))
        if kind == "down":
            yield from (slab[:, order] for slab in slabs)
            return
        whole = np.concatenate(list(slabs))
        for start in range(0, len(order), slab_rows):
            yield whole[order[start : start + slab_rows]]

    def vector(self, name: str) -> NDArray[np.float32]:
        """A vector; a predictor's bias is the only one that runs along neurons."""
        order = self._order(name) if name.endswith(".predictor_out_bias") else None
        values = self._source.vector(name)
        return values if order is None else values[order]

    def stored_as(self, name: str) -> str:
        """The source's own name for the type of a tensor."""
        return self._source.stored_as(name)

    def gram(self, name: str) -> NDArray[np.float32] | None:
        """As of the calibration; that of down has the order of its columns."""
        gram, order = self._calibration.gram(name), self._order(name)
        if gram is None or order is None or not name.endswith(".down"):
            return gram
        return gram[np.ix_(order, order)]

    def _order(self, name: str) -> NDArray[np.int64] | None:
        kind, *rest = name.split(".")
        firing = self._calibration.firing(int(rest[0])) if kind == "layers" else None
        return None if firing is None else firing.hottest


def sparsity_metadata(share: float, layers: list[Firing]) -> dict[str, str]:
    """What the file records of a calibration of all layers."""
    found = SparsityCalibration(
        share,
        tuple(layer.threshold for layer in layers),
        tuple(round(layer.zeros, 4) for layer in layers),
        tuple(layer.quantiles for layer in layers),
    )
    return {SPARSITY_KEY: json.dumps(found.to_json(), separators=(",", ":"))}
