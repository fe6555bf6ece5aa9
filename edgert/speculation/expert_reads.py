"""What a tree of guesses costs where the target's experts are streamed: its rows need the union of theirs."""

import math
from typing import NamedTuple

from edgert.experts import ExpertStore
from edgert.model.forward import Forward

_SMOOTHING = 0.1
"""Of a new observation: about the last twenty forwards count, the time in which a cache changes."""
_ALL = 0.999
"""Of a layer's experts: a union so large says no more about how alike the rows are."""


class Reads(NamedTuple):
    """What forwards asked of the store, in all or between two looks."""

    asked: float  # experts, over all layers
    nbytes: float  # read from flash
    waited_s: float  # for them, whether something was guessed meanwhile or not

    def since(self, before: "Reads") -> "Reads":
        """What came after an earlier look."""
        return Reads(*(now - then for now, then in zip(self, before, strict=True)))


NONE = Reads(0, 0, 0.0)
"""Where nothing is streamed."""


def reads_so_far(forward: Forward) -> Reads:
    """All that a forward path has asked for, where that is experts. Neurons are no part of this: what rows
    wait for them is in the seconds that are learned of rows."""
    if not isinstance(forward.store, ExpertStore):
        return NONE
    total = forward.store.totals()
    waited = total["io_wait_s"] + forward.waits.used_s
    return Reads(total["hits"] + total["misses"], total["bytes_read"], waited)


class ExpertReads:
    """Seconds that a forward waits for experts, by its rows: predicted from what forwards asked and read.

    A row takes k of a layer's E experts; r rows as unlike as strangers take E (1 - (1 - k/E)^r) different
    ones, r rows that agree take k. In between, each further row counts for `newness` of a stranger, which
    is what was measured of unions. Of these experts a share is missing; a missing one is so many bytes,
    and a byte so long a wait: less than the flash takes for it, where computing goes on meanwhile.
    """

    def __init__(self, experts: int, active: int, layers: int, expert_bytes: float) -> None:
        self._experts, self._layers, self._expert_bytes = experts, layers, expert_bytes
        self._untouched = 1 - active / experts  # share of a layer's experts that one row leaves alone
        self.newness, self._unions = 1.0, 1  # until unions are seen: no luck is hoped for
        self._missing: dict[
            bool, float
        ] = {}  # share of the experts asked for that was read; of many rows or one
        self._waited_s = self._bytes = 0.0  # fading sums

    @classmethod
    def of(cls, store: ExpertStore) -> "ExpertReads":
        """For the experts of this store."""
        sizes = [segment.span for layer in store.index for segment in layer]
        layers = sum(bool(layer) for layer in store.index)
        return cls(store.spec.experts, store.spec.active_experts, layers, sum(sizes) / len(sizes))

    def observe(self, rows: int, reads: Reads) -> None:
        """A forward of `rows` rows asked and read this."""
        if not reads.asked:
            return
        union = reads.asked / (self._experts * self._layers)
        if rows > 1 and union < _ALL and self._untouched > 0:
            strangers = math.log(1 - union) / math.log(self._untouched)
            newness = min(1.0, max(0.0, (strangers - 1) / (rows - 1)))
            self._unions += 1  # the guess that it started with counts as one
            self.newness += max(_SMOOTHING, 1 / self._unions) * (newness - self.newness)
        share = reads.nbytes / (reads.asked * self._expert_bytes)
        before = self._missing.get(rows > 1, share)
        self._missing[rows > 1] = before + _SMOOTHING * (share - before)
        self._waited_s += reads.waited_s - _SMOOTHING * self._waited_s
        self._bytes += reads.nbytes - _SMOOTHING * self._bytes

    def union(self, rows: int) -> float:
        """Experts that `rows` rows of a tree need, over all layers."""
        strangers = 1 + self.newness * (rows - 1)
        return self._layers * self._experts * (1 - float(self._untouched**strangers))

    def nbytes(self, rows: int) -> float:
        """Bytes that they are expected to be read."""
        missing = self._missing.get(rows > 1, self._missing.get(False, 0.0))
        return self.union(rows) * missing * self._expert_bytes

    def seconds(self, rows: int) -> float:
        """How long a forward of so many rows is expected to wait."""
        return self.nbytes(rows) * self._waited_s / self._bytes if self._bytes else 0.0
