"""What is streamed: spans of a file, in groups that the program needs one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edgert.format.layout import page_padded


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes that are read and given up as a whole: an expert."""

    name: str  # for messages
    offset: int  # in the file, a multiple of PAGE
    nbytes: int  # without the bytes up to the next page, which are read too
    kind: int = 0  # a word for the program, beside the segment's place in the table: its precision
    sha256: str = ""  # of the nbytes in lowercase hexadecimal; needed where they are verified

    @property
    def span(self) -> int:
        """Bytes of its pages."""
        return page_padded(self.nbytes)


Index = Sequence[Sequence[Segment]]
"""Segments by group, then by member. A group is what one request asks from: one layer. The program goes
through the groups in their order, and from the last to the first again; a group may be empty."""


class Key(NamedTuple):
    """One segment of an index."""

    group: int
    member: int


class Request(NamedTuple):
    """What the program said it needs now (kernels/requests.py)."""

    number: int
    step: int  # of the forward that asked
    group: int
    rows: int  # tokens that are computed at once
    members: list[int]  # of the group, each once
    ahead: list[int]  # of the next group, as the program predicts it: best first, with repetitions


NOTHING = Request(0, 0, 0, 0, [], [])
"""Before the program has asked for anything."""
