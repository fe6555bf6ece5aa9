"""Weights that stay on flash: a fixed arena of slots, and the threads that fill them.

The compiled program says which segments of a group it needs (kernels/requests.py) and computes whatever
is there while the rest is read. What the segments are, this store does not know: an index says where they
lie, and whoever attaches the program says which of the newest request's are computed already.

Several reads are in flight, of one segment's pieces or of several segments; a segment's place is given to
the program when it is whole. So the order of arrival is free, and no result depends on it.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ChecksumError, EdgertError, ModelFileError
from edgert.flash.config import Streaming
from edgert.flash.governor import Governor
from edgert.flash.memory import large_pages
from edgert.flash.pace import Pace
from edgert.flash.policy import Policy
from edgert.flash.predict import Predictor
from edgert.flash.reading import Reading, Span, cut, read_span
from edgert.flash.ring import Ring
from edgert.flash.segments import Index, Key, Request
from edgert.flash.slots import Slots
from edgert.flash.source import Source

_NAP = 50e-6
"""Seconds between looks at whether a segment in use is computed, where every slot holds one."""
_NEARLY_ALL = 0.8
"""Of a group: a request for so much (of many rows) is followed by one for nearly all of the next."""


@dataclass(slots=True)
class _Load:
    """One segment on its way into a slot."""

    key: Key
    slot: int
    pieces: list[Span]  # not begun yet, the first one last
    wanted: bool  # by the newest request; else it was read ahead, or nobody needs it any more
    early: bool  # begun before any request asked for it
    running: int = 0  # pieces being read
    dropped: bool = False  # not all of its pieces will be read
    error: EdgertError | None = None

    def drop(self) -> None:
        """Begin no more pieces."""
        self.dropped = self.dropped or bool(self.pieces)
        self.pieces.clear()


class SegmentStore:
    """Streams the segments of an index. Made before the program that uses it, closed after it.

    policy says what keeping a segment is worth, predictor what the next group will need. order: what is
    read first of several missing members; tests shuffle. Nothing it does changes a bit of the output.
    """

    def __init__(
        self,
        index: Index,
        source: Source,
        slots: int,
        streaming: Streaming,
        policy: Policy,
        predictor: Predictor | None,
        reading: Reading,
        *,
        order: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.index, self.source, self.streaming, self.reading = index, source, streaming, reading
        self._policy, self._predictor, self._order = policy, predictor, order
        self.slot_bytes = largest(index)
        # Pages of memory that belong to nobody yet: resident only as slots fill.
        self._memory = large_pages(slots * self.slot_bytes)
        self.arena: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)  # [slots * slot_bytes]
        self.arena.flags.writeable = False  # for the program, as a mapped file is
        self.ring = Ring(index)
        self.governor = Governor(streaming.prefetch == "auto")
        self._finished: Callable[[int], bool] = lambda i: False
        # All below is guarded by the lock.
        self._lock = threading.Lock()
        self.slots = Slots(slots, len(index), self.ring.members)
        self._loads: dict[Key, _Load] = {}  # in the order in which they began
        self._fresh: set[Key] = set()  # read ahead, not used yet
        self._verified: set[Key] = set()
        self._seen = 0  # requests whose statistics are taken
        self._ahead: Sequence[int] = ()  # what the last of them predicts
        self._begun_early = 0  # loads, since the newest request
        self._short_of_slots = self._napping = False
        self._counts = dict.fromkeys(("bytes_read", "prefetched", "prefetch_useful"), 0)
        self._pace = Pace()
        self._blocked_s = 0.0  # what `wait` slept
        self._error: EdgertError | None = None
        self._closing = False
        self._arrived = threading.Event()
        self._bell, self._ring_end = os.pipe()
        os.set_blocking(self._ring_end, False)  # a full pipe is rung enough
        self.ring.bell(self._ring_end)
        self._threads = [
            threading.Thread(target=self._serve, daemon=True, name=f"edgert-flash-{n}")
            for n in range(reading.readers)
        ]
        for thread in self._threads:
            thread.start()

    # ---- what the forward path calls: streamed.Store -----------------------------------------

    @property
    def table(self) -> NDArray[np.int64]:
        """Places and requests (kernels/requests.py)."""
        return self.ring.table

    @property
    def control(self) -> int:
        """The word of `table` where its control words start."""
        return self.ring.control

    def attach(self, finished: Callable[[int], bool]) -> None:
        """finished: whether the i-th member of the newest request is computed, and its slot free to go."""
        self._finished = finished

    def preload(self, keys: Sequence[Key]) -> None:
        """Read these before the program starts, and never give them up; raises what goes wrong.

        Of the slots, at least as many must be left as one row needs.
        """
        with self._lock:
            for key in keys:
                slot = self.slots.take_free()
                assert slot is not None
                self._begin_load(key, slot, wanted=True)
        self._awaken()
        while self._error is None and self._loads:
            self._sleep()
        if self._error is not None:
            raise self._error
        self.slots.pin(keys)

    def begin(self, rows: int, most: int) -> int:
        """Before a forward of so many rows; for how many of them (at most `most`) to predict members."""
        with self._lock:
            self.ring.next_step()
            self._error = None
            for load in self._loads.values():  # of a forward before: nobody waits for them any more
                load.wanted = False
        wants = self.streaming.predictor == "router" and self._prefetching
        return rows if wants and rows <= most else 0

    def end(self, rows: int, seconds: float) -> None:
        """After a forward; raises what went wrong with reading, before anything computed is used."""
        if self._error is not None:
            raise self._error
        if rows == 1 and self._predictor is not None:
            self.governor.note(seconds)

    @property
    def arrived(self) -> bool:
        """Whether all that the newest request needs is there, or all that has room, or no more will come."""
        return self._error is not None or self._short_of_slots or not self._missing(self.ring.newest())

    def wait(self) -> None:
        """Without overlap, sleep until it has arrived.

        With overlap it returns at once: the program computes what is there, and waits for the rest itself.
        """
        began = time.perf_counter()
        while not (self.streaming.overlap or self.arrived):
            self._sleep()
        self._blocked_s += time.perf_counter() - began

    def totals(self) -> dict[str, float]:
        """Counts since the store was made."""
        counts = self.ring.counts()
        return {**counts, **self._counts, "io_wait_s": counts["io_wait_s"] + self._blocked_s}

    def prefetch_report(self) -> str:
        """Whether segments are read ahead, and what that was measured to bring."""
        return "off" if self._predictor is None else self.governor.report()

    def close(self) -> None:
        """End the threads and give the file back; the forward path must be closed before."""
        if self._closing:
            return
        self._closing = True
        self._awaken()
        for thread in self._threads:
            thread.join()
        os.close(self._bell)
        os.close(self._ring_end)
        self.source.close()

    # ---- what the program needs --------------------------------------------------------------

    def _missing(self, request: Request) -> list[int]:
        """What is not there and still needed; a member that is computed may be gone again."""
        held = self.slots.slot_of[request.group]
        return [m for i, m in enumerate(request.members) if held[m] < 0 and not self._is_finished(i, request)]

    def _is_finished(self, i: int, request: Request) -> bool:
        """Whether the i-th member of the request is computed; all are when a newer one came."""
        return self._finished(i) or self.ring.number != request.number

    def _take_note(self, newest: Request) -> None:
        """The statistics of all requests since the last, and what the newest makes of the loads there are."""
        if self._seen == newest.number:
            return
        ahead: list[int] = []
        for number in self.ring.since(self._seen, newest.number):
            request = self.ring.request(number)
            self._policy.used(request.group, request.step, request.members, self.ring.weights(number))
            used = self._fresh.intersection(Key(request.group, m) for m in request.members)
            self._counts["prefetch_useful"] += len(used)
            self._fresh -= used
            if self._predictor is not None:
                ahead = self._predictor.next_members(request.group, request.members, request.ahead)
        self._seen, self._ahead, self._begun_early = newest.number, ahead, 0
        needed = {Key(newest.group, m) for m in newest.members}
        for load in list(self._loads.values()):
            load.wanted = load.key in needed and load.error is None
            if not load.wanted:
                load.drop()  # a guess that was wrong, or too late
                if not load.running:
                    self._finish(load)
            elif load.early:
                load.early = False
                self._counts["prefetched"] += 1
                self._counts["prefetch_useful"] += 1

    def _next_load(self) -> _Load | None:
        """A load with pieces to read, begun now if need be: first for the newest request, then ahead."""
        self._short_of_slots = False
        request = self.ring.newest()
        if self._error is not None or request.step != self.ring.step:
            return None  # whoever asked has gone, or is told of the error
        self._take_note(request)
        for load in self._loads.values():
            if load.wanted and load.pieces:
                return load
        missing = [m for m in self._missing(request) if Key(request.group, m) not in self._loads]
        return self._begin_wanted(request, missing) if missing else self._next_early(request)

    def _begin_wanted(self, request: Request, missing: list[int]) -> _Load | None:
        self._pace.needs(request.number)
        slot = self._take_slot(request, ())
        if slot is None:
            self._short_of_slots = True  # until a member is computed, or a read ahead is through
            self._arrived.set()
            return None
        return self._begin_load(Key(request.group, self._order(missing)[0]), slot, wanted=True)

    @property
    def _prefetching(self) -> bool:
        return self._predictor is not None and self.governor.on

    def _next_early(self, request: Request) -> _Load | None:
        """Go on with, or begin, a segment predicted for the next group, where there is time for it."""
        group = request.group + 1
        if not self._prefetching or group >= len(self.index) or not self.index[group]:
            return None
        early = [load for load in self._loads.values() if not load.wanted]
        if sum(load.running for load in early) >= max(1, self.reading.readers - 1):
            return None  # one thread stays free for what will be needed
        for load in early:
            if load.pieces:
                return load
        if self._begun_early >= self._pace.room(self.slot_bytes):
            return None
        ahead = self._ahead
        if len(request.members) >= _NEARLY_ALL * len(self.index[request.group]):
            ahead = range(len(self.index[group]))
        predicted = [Key(group, member) for member in ahead]
        for key in predicted:
            if self.slots.slot_of[key] < 0 and key not in self._loads:
                slot = self._take_slot(request, predicted)
                if slot is None:
                    return None
                self._begun_early += 1
                return self._begin_load(key, slot, wanted=False)
        return None

    def _begin_load(self, key: Key, slot: int, wanted: bool) -> _Load:
        segment, start = self.index[key.group][key.member], slot * self.slot_bytes
        view = memoryview(self._memory)[start : start + segment.span]
        whole = Span(segment.name, segment.offset, view, segment.nbytes)
        load = _Load(key, slot, cut(whole, self.reading.piece)[::-1], wanted, not wanted)
        self._loads[key] = load
        return load

    def _take_slot(self, request: Request, guarded: Sequence[Key]) -> int | None:
        """A free slot, or that of the segment worth least which neither the request nor `guarded` needs."""
        slot = self.slots.take_free()
        if slot is not None:
            return slot
        needed = [
            Key(request.group, m) for i, m in enumerate(request.members) if not self._is_finished(i, request)
        ]
        victim = self.slots.least_worth(self._policy.values, [*needed, *guarded], request.group)
        if victim is None:
            return None
        self.ring.place(victim, None)
        newest = self.ring.newest()
        if (
            newest.number != request.number
            and victim.group == newest.group
            and victim.member in newest.members
        ):
            self.ring.place(victim, int(self.slots.slot_of[victim]) * self.slot_bytes)
            return None
        self._fresh.discard(victim)
        return self.slots.take_from(victim)

    # ---- the reading threads -----------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            os.read(self._bell, 4096)
            try:
                while not self._closing and self._work():
                    pass
            except Exception as error:  # a defect of ours must not leave the program waiting for ever
                self._fail(ModelFileError(f"streaming failed ({type(error).__name__}: {error})"))
            if self._closing:
                self._awaken()  # the next of us
                return

    def _work(self) -> bool:
        """Read one piece of what is needed, or may be needed next; False where there is none to begin."""
        with self._lock:
            load = self._next_load()
            if load is not None:
                piece = load.pieces.pop()
                load.running += 1
                self._pace.begin()
            elif self._short_of_slots and not self._napping:
                self._napping = True
            else:
                return False
        if load is None:
            time.sleep(_NAP)
            self._napping = False
            return True
        if self.reading.readers > 1:
            self._awaken()  # another thread may find more to do
        self._read(load, piece)
        return True

    def _read(self, load: _Load, piece: Span) -> None:
        error: EdgertError | None = None
        try:
            read_span(self.source, piece)
        except EdgertError as found:
            error = found
        with self._lock:
            self._counts["bytes_read"] += len(piece.into)
            if error is not None:
                load.error = error
                load.drop()
            whole = load.running == 1 and not load.pieces and not load.dropped and load.error is None
        if whole and self.streaming.verify and load.key not in self._verified:
            load.error = self._damage(load)
        with self._lock:
            load.running -= 1
            self._pace.end(len(piece.into), load.wanted)
            if not load.running and not load.pieces:
                self._finish(load)

    def _damage(self, load: _Load) -> EdgertError | None:
        """What is wrong with the bytes that came."""
        segment, start = self.index[load.key.group][load.key.member], load.slot * self.slot_bytes
        held = memoryview(self._memory)[start : start + segment.nbytes]
        if hashlib.sha256(held).hexdigest() == segment.sha256:
            self._verified.add(load.key)
            return None
        return ChecksumError(
            f"found other bytes than were written in {segment.name}, expected its SHA-256; "
            "copy the file again or convert the model again"
        )

    def _finish(self, load: _Load) -> None:
        """A load is over: its segment is there, or its slot free again."""
        del self._loads[load.key]
        if load.error is not None or load.dropped:
            self.slots.give_back(load.slot)
            if load.error is not None and load.wanted:  # else it is asked for again, if it is needed
                self._fail(load.error)
            return
        self.slots.hold(load.slot, load.key)
        if load.early:
            self._fresh.add(load.key)
            self._counts["prefetched"] += 1
        self.ring.place(load.key, load.slot * self.slot_bytes)
        self._arrived.set()

    def _fail(self, error: EdgertError) -> None:
        self._error = error
        self.ring.fail()
        self._arrived.set()

    def _awaken(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._ring_end, b"\1")

    def _sleep(self) -> None:
        self._arrived.wait(0.05)
        self._arrived.clear()


def largest(index: Index) -> int:
    """Bytes of the largest segment, in whole pages: the size of a slot."""
    return max(segment.span for group in index for segment in group)
