"""The table that a store and a running program share: places of segments, and what the program asks for."""

import numpy as np
from numpy.typing import NDArray

from edgert.flash.segments import NOTHING, Index, Key, Request
from edgert.kernels import requests as words


class Ring:
    """The store's side of kernels/requests.py."""

    def __init__(self, index: Index) -> None:
        groups, self.members = len(index), max(len(group) for group in index)
        self.control = groups * self.members * words.TABLE
        size = int(words.request_words(self.members))
        self.table: NDArray[np.int64] = np.zeros(self.control + words.CONTROL + words.RING * size, np.int64)
        places = self.table[: self.control].reshape(groups, self.members, words.TABLE)
        places[:, :, 0] = words.ABSENT
        for number, group in enumerate(index):
            places[number, : len(group), 1] = [segment.kind for segment in group]

    def place(self, key: Key, at: int | None) -> None:
        """Tell the program where a segment lies, or that it does not."""
        word = (key.group * self.members + key.member) * words.TABLE
        words.place(self.table, word, words.ABSENT if at is None else at)

    @property
    def number(self) -> int:
        """Of the newest request; 0 before the first."""
        return int(words.newest_request(self.table, self.control))

    def newest(self) -> Request:
        """The newest request."""
        number = self.number
        return self.request(number) if number else NOTHING

    def request(self, number: int) -> Request:
        """One of the last RING requests."""
        entry = self._entry(number)
        count, known = int(entry[words.COUNT]), int(entry[words.AHEAD])
        lists = entry[words.HEAD :]
        return Request(
            number,
            int(entry[words.STEP_OF]),
            int(entry[words.GROUP]),
            int(entry[words.ROWS]),
            lists[:count].tolist(),
            lists[2 * self.members : 2 * self.members + known].tolist(),
        )

    def weights(self, number: int) -> NDArray[np.float64]:
        """What each member of the request's group weighs in it: float64 [members]."""
        first = words.HEAD + self.members
        return self._entry(number)[first : first + self.members].astype(np.float64)

    def since(self, seen: int, newest: int) -> range:
        """Numbers of the requests after `seen` that are still kept."""
        return range(max(seen, newest - words.RING + 1) + 1, newest + 1)

    @property
    def step(self) -> int:
        """Of the forward in progress: the caller's count."""
        return int(self.table[self.control + words.STEP])

    def next_step(self) -> None:
        """A forward begins."""
        self.table[self.control + words.STEP] += 1
        self.table[self.control + words.FAILED] = 0

    def fail(self) -> None:
        """Let the program end the forward: what it waits for will not come."""
        words.place(self.table, self.control + words.FAILED, 1)

    def bell(self, descriptor: int) -> None:
        """Where the program rings when something is not there."""
        self.table[self.control + words.BELL] = descriptor

    def counts(self) -> dict[str, float]:
        """What the program counted."""
        at = self.table[self.control :]
        return {
            "hits": int(at[words.HITS]),
            "misses": int(at[words.MISSES]),
            "io_wait_s": float(at[words.WAITED]) * 1e-9,
            "swapped": int(at[words.SWAPPED]),
            "dropped": int(at[words.DROPPED]),
            "stood_in": int(at[words.STOOD_IN]),
        }

    def _entry(self, number: int) -> NDArray[np.int64]:
        size = int(words.request_words(self.members))
        at = self.control + words.CONTROL + number % words.RING * size
        return self.table[at : at + size]


def warm_up() -> None:
    """Compile what a ring calls beside the program."""
    table: NDArray[np.int64] = np.zeros(16, np.int64)
    words.place(table, 0, int(words.request_words(1)))
    words.newest_request(table, 0)
