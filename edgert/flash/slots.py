"""Which segment lies in which slot of the arena, and which one may give way."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.flash.segments import Key


class Slots:
    """The bookkeeping of a fixed number of slots; it moves no bytes."""

    def __init__(self, count: int, groups: int, members: int) -> None:
        self.count = count
        self._free = list(range(count))
        self.slot_of: NDArray[np.int64] = np.full((groups, members), -1, np.int64)  # -1: not in memory
        self._pinned = np.zeros((groups, members), bool)

    def take_free(self) -> int | None:
        """A slot that holds nothing, which the caller fills or gives back."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """It was not filled."""
        self._free.append(slot)

    def hold(self, slot: int, key: Key) -> None:
        """It was filled."""
        self.slot_of[key] = slot

    def take_from(self, key: Key) -> int:
        """The slot of a segment that goes."""
        slot = int(self.slot_of[key])
        self.slot_of[key] = -1
        return slot

    def pin(self, keys: Sequence[Key]) -> None:
        """Never let these go."""
        for key in keys:
            self._pinned[key] = True

    def least_worth(self, values: NDArray[np.float64], needed: Sequence[Key], group: int) -> Key | None:
        """The segment to give up for another: of the smallest value, and not among those needed.

        values [G, M]. group: the one being computed. Of equal worth goes the segment whose group's turn
        comes last: those of the groups before this one, backwards.
        """
        may_go = (self.slot_of >= 0) & ~self._pinned
        for key in needed:
            may_go[key] = False
        groups, members = np.nonzero(may_go)
        if not len(groups):
            return None
        turns = (groups - group - 1) % len(self.slot_of)
        best = int(np.lexsort((-turns, values[groups, members]))[0])
        return Key(int(groups[best]), int(members[best]))
