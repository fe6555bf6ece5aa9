"""Columns of matrices stored apart in 8 bits: those whose inputs are so large that their errors count most.

LLM.int8() (Dettmers et al., 2022, arXiv:2208.07339, section 3.2) found that a few features of a row are up to
twenty times the others, in the same places for every token. Rounding then costs most in the columns that meet
them, and a scale that has to hold them leaves few steps for the rest of their group. So they are taken out,
of the matrix and of the row: what is left is rounded as if they were not, and theirs is a product of its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.converters.quantize import Codes
from edgert.errors import OptionError
from edgert.format.tensors import INPUTS, input_of

Floats = NDArray[np.float32]
APART = "_outliers"
COLUMNS = "_columns"


class Source(Protocol):
    """A WeightSource (pipeline.py)."""

    def rows(self, name: str, slab_rows: int) -> Iterator[Floats | Codes]:
        """A matrix in slabs of rows."""

    def vector(self, name: str) -> Floats:
        """A vector."""

    def stored_as(self, name: str) -> str:
        """The source's own name for the type of a tensor."""


class Meets(Protocol):
    """The part of a Calibration that knows what matrices meet."""

    def gram(self, name: str) -> Floats | None:
        """The mean of x x^T over the rows that a matrix met."""


def with_outliers(spec: ModelSpec, count: int, calibrated: bool) -> ModelSpec:
    """The spec of a model whose matrices have `count` columns apart; OptionError where that cannot be."""
    if not count:
        return spec
    if not calibrated:
        raise OptionError(f"outliers is {count}, which needs a text to find them; give calibrate")
    try:
        return replace(spec, outliers=count)
    except ValueError as error:
        raise OptionError(f"{error}; give another number, or none") from None


class Outliers:
    """A WeightSource and the Gram matrices of a calibration, with the outlier columns apart."""

    def __init__(self, source: Source, calibration: Meets | None, count: int) -> None:
        """calibration: None for a plan, which asks for no numbers."""
        self._source, self._calibration, self._count = source, calibration, count
        self._found: dict[str, NDArray[np.int64]] = {}  # by input
        self._rest: tuple[Floats, Floats] | None = None  # the last Gram matrix, and the same without them

    def rows(self, name: str, slab_rows: int) -> Iterator[Floats | Codes]:
        """A matrix in slabs of rows: without its outlier columns, or these alone."""
        base = name.removesuffix(APART)
        kind = input_of(base)
        if kind is None:
            yield from self._source.rows(name, slab_rows)
            return
        columns = self._columns(base, kind)
        for slab in self._source.rows(base, slab_rows):
            whole = slab.floats() if isinstance(slab, Codes) else slab
            if name != base:
                yield np.ascontiguousarray(whole[:, columns])
                continue
            rest = whole.copy()
            rest[:, columns] = 0
            yield rest

    def vector(self, name: str) -> Floats:
        """A vector; the columns of an input as numbers."""
        if not name.endswith(COLUMNS):
            return self._source.vector(name)
        layer, _, kind = name.removesuffix(COLUMNS).rpartition(".")
        return self._columns(f"{layer}.{INPUTS[kind][-1]}", kind).astype(np.float32)

    def stored_as(self, name: str) -> str:
        """The source's own name for the type of a tensor."""
        return "" if name.endswith(COLUMNS) else self._source.stored_as(name.removesuffix(APART))

    def gram(self, name: str) -> Floats | None:
        """As of the calibration, of rows without their outliers."""
        if name.endswith(APART):
            return None
        gram, kind = self._met(name), input_of(name)
        if gram is None or kind is None:
            return gram
        if self._rest is None or self._rest[0] is not gram:
            columns, rest = self._columns(name, kind), gram.copy()
            rest[columns], rest[:, columns] = 0, 0
            self._rest = gram, rest
        return self._rest[1]

    def _met(self, name: str) -> Floats | None:
        return self._calibration.gram(name) if self._calibration else None

    def _columns(self, matrix: str, kind: str) -> NDArray[np.int64]:
        """The columns of an input with the most energy, ascending. matrix: one that meets it."""
        place = f"{matrix.rpartition('.')[0]}.{kind}"
        if place not in self._found:
            gram = self._met(matrix)
            assert gram is not None  # every matrix of a dense layer meets every token
            largest = np.argsort(-np.diag(gram), kind="stable")[: self._count]
            self._found[place] = np.sort(largest)
        return self._found[place]
