"""What a forward of so many rows takes on this machine, learned from the forwards of the run itself."""

import math

_MEMORY = 0.98
"""What one observation leaves of those before it, in the line; about the last fifty count."""
_LINE_WEIGHT = 2.0
"""Observations of a row count that the line through all of them counts for."""
_GUESSED_SLOPE = 0.15
"""Of one row's time: what a further row is taken to cost before any was seen. Optimistic, so that
trying it settles it."""
_OUTLIER = 3.0
"""An observation counts as at most so many times what was expected: a machine that did something else
for a moment says nothing of the rows."""


class RowCost:
    """Seconds of a forward by its number of rows: a line through all, corrected where it was seen."""

    def __init__(self) -> None:
        # Sums over the observations, fading: of 1, rows, rows squared, seconds, rows * seconds.
        self._sums = [0.0] * 5
        self._seen: dict[int, tuple[float, float, int]] = {}  # by size: weight, mean, turn of the last
        self._turn = 0

    @property
    def known(self) -> bool:
        """Whether there was any observation."""
        return self._turn > 0

    def observe(self, rows: int, seconds: float) -> None:
        """A forward of `rows` rows took so long."""
        if self.known:
            seconds = min(seconds, _OUTLIER * self.seconds(rows))
        self._turn += 1
        new = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [total * _MEMORY + value for total, value in zip(self._sums, new, strict=True)]
        size = _size(rows)
        weight = self._weight(size) + 1.0
        mean = self._seen[size][1] if size in self._seen else seconds
        self._seen[size] = (weight, mean + (seconds - mean) / weight, self._turn)

    def seconds(self, rows: int) -> float:
        """What a forward of `rows` rows is expected to take; 0 before the first observation."""
        line = self._line(rows)
        weight = self._weight(_size(rows))
        if weight == 0.0:
            return line
        return (weight * self._seen[_size(rows)][1] + _LINE_WEIGHT * line) / (weight + _LINE_WEIGHT)

    def _weight(self, size: int) -> float:
        if size not in self._seen:
            return 0.0
        weight, _, turn = self._seen[size]
        return min(weight, 20.0) * math.pow(_MEMORY, self._turn - turn)

    def _line(self, rows: int) -> float:
        if not self.known:
            return 0.0
        count, rows_sum, squares, seconds, products = self._sums
        mean_rows, mean = rows_sum / count, seconds / count
        spread = squares / count - mean_rows * mean_rows
        if spread < 0.01:  # all of one size
            base = mean / (1 + _GUESSED_SLOPE * (mean_rows - 1))
            return base * (1 + _GUESSED_SLOPE * (rows - 1))
        slope = max(0.0, (products / count - mean_rows * mean) / spread)
        return max(mean + slope * (rows - mean_rows), mean * min(1.0, rows / mean_rows))


def _size(rows: int) -> int:
    """Row counts that are taken as one: each up to 8, then fours. Kernels take rows by 1, 2, 4 and 8."""
    return rows if rows <= 8 else -(-rows // 4) * 4
