"""Where a forward waits for data, and what may be done meanwhile.

A resident model never waits. A streamed one asks here, between its parts, whether the weights it
needs have arrived; whoever has provisional work (a draft that can guess on) sets `idle`.
"""

import time
from collections.abc import Callable


class Waits:
    """The wait points of one forward path.

    `idle` does a small piece of work and says whether there was any: no more than some tenths of a
    millisecond, because what is waited for may arrive at once. It is called only while something is
    really missing: a forward that computes all the time never calls it.
    """

    def __init__(self) -> None:
        self.idle: Callable[[], bool] | None = None
        self.waited_s = 0.0  # in all
        self.used_s = 0.0  # of it, spent on idle work

    def until(self, ready: Callable[[], bool], block: Callable[[], object]) -> None:
        """Return once `ready()`; `block` sleeps until then, where there is nothing to do meanwhile."""
        if ready():
            return
        began = time.perf_counter()
        while not ready():
            turn = time.perf_counter()
            if self.idle is None or not self.idle():
                block()
                break
            self.used_s += time.perf_counter() - turn
        self.waited_s += time.perf_counter() - began
