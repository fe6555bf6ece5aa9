"""What quantisation wants to know of the rows that a matrix meets."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

AT_ONCE: Final = 1024
"""Rows multiplied at once. For those of a short document alone a K by K matrix is read and written."""


class ExpertUses:
    """How many tokens chose each expert, [L, E]: an Observer."""

    def __init__(self, layers: int, experts: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros((layers, experts), np.int64)

    def see(self, names: tuple[str, ...], rows: Floats) -> None:
        """Count the rows that an expert's `down` meets: those that chose it."""
        parts = names[0].split(".")  # layers.I.experts.J.down
        if len(parts) == 5 and parts[2] == "experts":
            self.counts[int(parts[1]), int(parts[3])] += len(rows)

    def see_gates(self, layer: int, rows: Floats) -> None:
        """Of no interest here."""


class Grams:
    """Of every input the mean of x x^T over all rows: an Observer.

    Its diagonal is the mean square of each column, which weighs the rounding errors of that column; the
    whole says how an error in one column is made up for in others (Frantar et al., 2022, GPTQ,
    arXiv:2210.17323, section 3). K * K floats for each input: clear it between layers.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Floats] = {}  # by the first name of an input, [K, K]
        self._means: dict[str, Floats] = {}  # the same, divided by the rows
        self._waiting: dict[str, list[Floats]] = {}  # rows not yet added, fewer than AT_ONCE
        self._input: dict[str, str] = {}  # the first name of what a matrix meets, by its name
        self._rows: dict[str, int] = {}

    def see(self, names: tuple[str, ...], rows: Floats) -> None:
        """Add the rows [R, K]."""
        first = names[0]
        self._input.update(dict.fromkeys(names, first))
        self._rows[first] = self._rows.get(first, 0) + len(rows)
        waiting = self._waiting.setdefault(first, [])
        waiting.append(rows.copy())
        if sum(map(len, waiting)) >= AT_ONCE:
            self._add(first)

    def see_gates(self, layer: int, rows: Floats) -> None:
        """Nothing: no matrix meets them."""

    def _add(self, first: str) -> None:
        waiting = self._waiting.pop(first, [])
        if waiting:
            rows = np.concatenate(waiting)
            product = rows.T @ rows
            if first in self._sums:
                self._sums[first] += product
            else:
                self._sums[first] = product

    def rows(self, name: str) -> int:
        """How many rows a matrix met; 0 for one that was not observed."""
        return self._rows.get(self._input.get(name, ""), 0)

    def mean(self, name: str) -> Floats | None:
        """The mean of x x^T over the rows that a matrix met, [K, K]; None for one that met none.

        To be asked for when all rows were seen. The same array for all matrices that met the same rows.
        """
        first = self._input.get(name)
        if first is None:
            return None
        if first not in self._means:
            self._add(first)
            self._means[first] = self._sums.pop(first)
            self._means[first] /= np.float32(self._rows[first])
        return self._means[first]

    def clear(self) -> None:
        """Forget everything."""
        for held in (self._sums, self._means, self._waiting, self._input, self._rows):
            held.clear()
