"""What the forward path knows of a store, and the planner of what one streams."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.flash.config import Streaming


@dataclass(frozen=True, slots=True)
class Parts:
    """The weights of a model that need not all be in memory."""

    name: str  # of several: "experts"
    count: int  # how many there are
    nbytes: int  # of all of them in the file
    slot: int  # bytes of memory for one
    fewest: int  # of them that must fit
    beside: int = 0  # bytes of memory that streaming takes in any case

    @property
    def least(self) -> int:
        """Bytes of memory in which they can be streamed."""
        return self.beside + self.fewest * self.slot

    def slots(self, room: int) -> int:
        """How many fit into so many bytes."""
        return max(0, min(self.count, (room - self.beside) // self.slot))


class Store(Protocol):
    """Streams the weights that a program asks for. Nothing it does changes a bit of the output."""

    streaming: Streaming
    arena: NDArray[np.uint8]  # what of them is in memory

    @property
    def table(self) -> NDArray[np.int64]:
        """What program and store tell each other."""

    @property
    def control(self) -> int:
        """The word of `table` where its control words start."""

    @property
    def arrived(self) -> bool:
        """Whether all that was asked for last is there, or will not come."""

    def begin(self, rows: int, most: int) -> int:
        """Before a forward of so many rows; for how many of them, at most `most`, to predict members."""

    def wait(self) -> None:
        """Sleep until `arrived`, where nothing may be computed before."""

    def end(self, rows: int, seconds: float) -> None:
        """After a forward; raises what went wrong with reading, before anything computed is used."""

    def totals(self) -> dict[str, float]:
        """Counts since the store was made: `hits`, `misses`, `bytes_read`, `io_wait_s` and others."""

    def report(self, before: Mapping[str, float]) -> dict[str, Any]:
        """What happened since `totals` gave `before`, for people and programs."""

    def close(self) -> None:
        """End its threads and give the file back; the forward path must be closed before."""
