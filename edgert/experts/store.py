"""The experts of a model that stay on flash: a fixed arena of slots, and the thread that fills them.

The compiled program says what a layer needs (kernels/experts.py, `publish`) and computes whatever is
there while this thread reads the rest. A slot is given to another expert only if the newest request
does not need its holder any more; the order of the two sides' reads and writes makes that safe.
"""

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, ModelSpec
from edgert.errors import ChecksumError, EdgertError, ModelFileError
from edgert.experts.config import Streaming
from edgert.experts.governor import Governor
from edgert.experts.policy import make_policy
from edgert.experts.predict import make_predictor
from edgert.experts.segments import Segments
from edgert.format import StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import expert_name
from edgert.kernels import experts as words

_NAP = 50e-6
"""Seconds between looks at whether an expert in use is finished, where every slot holds one."""
_SMOOTH = 0.1
"""Of a new measurement in the running means of read and spare times."""


class Request(NamedTuple):
    """What `publish` said."""

    number: int
    layer: int
    rows: int
    experts: list[int]
    ahead: list[int]


class ExpertStore:
    """Streams the experts of one open model. Made before the forward path, closed after it.

    tensors: those of the file, the experts' among them. order: what is read first of several missing
    experts; tests shuffle. Nothing it does changes a bit of the output.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: dict[str, StoredTensor],
        segments: Segments,
        slots: int,
        streaming: Streaming,
        *,
        uses: NDArray[np.float64] | None = None,
        order: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.spec, self.streaming, self.segments = spec, streaming, segments
        layers, experts = spec.layers, spec.experts
        self._tensors = [
            [tensors[expert_name(i, e)] for e in range(experts)] if spec.has_experts(i) else []
            for i in range(layers)
        ]
        self.slot_bytes = slot_bytes(spec, tensors)
        # Pages of memory that belong to nobody yet: resident only as slots fill.
        self._memory = mmap.mmap(-1, slots * self.slot_bytes)
        self.arena: NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)  # [slots * slot_bytes]
        self.arena.flags.writeable = False  # for the program, as a mapped file is
        self.control = layers * experts * words.TABLE
        ring = words.RING * int(words.request_words(experts))
        self.table: NDArray[np.int64] = np.zeros(self.control + words.CONTROL + ring, np.int64)
        places = self.table[: self.control].reshape(layers, experts, words.TABLE)
        places[:, :, 0] = words.ABSENT
        for layer, held in enumerate(self._tensors):
            places[layer, : len(held), 1] = [QUANTS.index(t.quant) for t in held]
        self._holder: list[tuple[int, int] | None] = [None] * slots  # layer and expert of each slot
        self._free = list(range(slots))
        self._slot: NDArray[np.int64] = np.full((layers, experts), -1, np.int64)
        self._pinned = np.zeros((layers, experts), bool)
        self._fresh = np.zeros((layers, experts), bool)  # read ahead, not used yet
        self._verified: set[tuple[int, int]] = set()
        self._policy = make_policy(streaming.policy, layers, experts)
        self._predictor = make_predictor(streaming.predictor, layers, experts, spec.active_experts)
        self.governor = Governor(streaming.prefetch == "auto")
        self._order = order
        self._seen = 0  # requests whose statistics are taken
        self._ahead: Sequence[int] = ()  # what the last of them predicts
        self._read_s = 0.0  # running mean of one read
        self._spare_s = 0.0  # running mean of the time between two layers' reads
        self._last_busy = 0.0
        self._counts = dict.fromkeys(("bytes_read", "prefetched", "prefetch_useful"), 0)
        self.routes: NDArray[np.int64] | None = None  # of the run: which experts are finished
        self._counters = self._units = 0
        self._error: EdgertError | None = None
        self._arrived = threading.Event()
        self._closing = False
        self._bell, ring_end = os.pipe()
        os.set_blocking(ring_end, False)  # a full pipe is rung enough
        self._ring_end = ring_end
        self.table[self.control + words.BELL] = ring_end
        self._pin(uses)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="edgert-experts")
        self._thread.start()

    # ---- what the forward path calls ---------------------------------------------------------

    def attach(self, routes: NDArray[np.int64], counters: int, units: int) -> None:
        """Where the run keeps the counters of a layer's experts, and the units of down of each."""
        self.routes, self._counters, self._units = routes, counters, units

    def begin(self, rows: int, most: int) -> int:
        """Before a forward of so many rows; for how many of them (at most `most`) to predict experts."""
        self.table[self.control + words.STEP] += 1
        self.table[self.control + words.FAILED] = 0
        self._error = None
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
        """Whether all that the newest request needs is there, or will not come."""
        request = self._newest()
        return self._error is not None or not self._missing(request)

    def wait(self) -> None:
        """Sleep until something has arrived."""
        self._arrived.wait(0.05)
        self._arrived.clear()

    def totals(self) -> dict[str, float]:
        """Counts since the store was made."""
        control = self.table[self.control :]
        counts = {"expert_hits": int(control[words.HITS]), "expert_misses": int(control[words.MISSES])}
        return {**counts, **self._counts, "io_wait_s": float(control[words.WAITED]) * 1e-9}

    def report(self, before: Mapping[str, float]) -> dict[str, Any]:
        """What happened since `totals` gave `before`, for people and programs."""
        since = {name: value - before[name] for name, value in self.totals().items()}
        slots = len(self._holder)
        return {**since, "expert_slots": slots, "prefetch": self.prefetch_report()}

    def prefetch_report(self) -> str:
        """Whether experts are read ahead, and what that was measured to bring."""
        return "off" if self._predictor is None else self.governor.report()

    def close(self) -> None:
        """End the thread and give the file back; the forward path must be closed before."""
        if self._closing:
            return
        self._closing = True
        os.write(self._ring_end, b"\1")
        self._thread.join()
        os.close(self._bell)
        os.close(self._ring_end)
        self.segments.close()

    # ---- the reading thread ------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            os.read(self._bell, 4096)
            if self._closing:
                return
            try:
                while self._work() and not self._closing:
                    pass
            except EdgertError as error:
                self._fail(error)
            except Exception as error:  # a defect of ours must not leave the program waiting for ever
                self._fail(ModelFileError(f"reading experts failed ({type(error).__name__}: {error})"))

    def _fail(self, error: EdgertError) -> None:
        self._error = error
        words.place(self.table, self.control + words.FAILED, 1)
        self._arrived.set()

    def _work(self) -> bool:
        """Read one missing expert of the newest request, or what may be needed next; False if all is done."""
        request = self._newest()
        ahead = self._note(request)
        missing = self._missing(request)
        now = time.perf_counter()
        if missing:
            if self._last_busy and now > self._last_busy:
                self._spare_s += _SMOOTH * (now - self._last_busy - self._spare_s)
            for expert in self._order(missing):
                self._load(request.layer, expert, request, ())
            self._last_busy = time.perf_counter()
            return True
        return self._read_ahead(request, ahead)

    def _newest(self) -> Request:
        return self.request(int(words.newest_request(self.table, self.control)))

    def request(self, number: int) -> Request:
        """One of the last RING requests."""
        size = int(words.request_words(self.spec.experts))
        at = self.control + words.CONTROL + number % words.RING * size
        entry = self.table[at : at + size]
        count, known, experts = int(entry[words.COUNT]), int(entry[words.AHEAD]), self.spec.experts
        lists = entry[words.HEAD :]
        return Request(
            number,
            int(entry[words.LAYER]),
            int(entry[words.ROWS]),
            lists[:count].tolist(),
            lists[2 * experts : 2 * experts + known].tolist(),
        )

    def _note(self, newest: Request) -> Sequence[int]:
        """Take the statistics of all requests since the last; the prediction that follows from the newest."""
        ahead: list[int] = []
        size = int(words.request_words(self.spec.experts))
        for number in range(max(self._seen, newest.number - words.RING + 1) + 1, newest.number + 1):
            request = self.request(number)
            at = self.control + words.CONTROL + number % words.RING * size
            first = at + words.HEAD + self.spec.experts
            weights = self.table[first : first + self.spec.experts].astype(np.float64)
            step = int(self.table[at + words.STEP_OF])
            self._policy.used(request.layer, step, request.experts, weights)
            used = self._fresh[request.layer, request.experts]
            self._counts["prefetch_useful"] += int(used.sum())
            self._fresh[request.layer, request.experts] = False
            if self._predictor is not None:
                ahead = self._predictor.next_experts(request.layer, request.experts, request.ahead)
        if self._seen != newest.number:
            self._seen, self._ahead = newest.number, ahead
        return self._ahead

    def _missing(self, request: Request) -> list[int]:
        """What is not there and still needed; an expert that is computed may be gone again."""
        slots = self._slot[request.layer]
        return [
            e for i, e in enumerate(request.experts) if slots[e] < 0 and not self._is_finished(i, request)
        ]

    @property
    def _prefetching(self) -> bool:
        return self._predictor is not None and self.governor.on

    def _read_ahead(self, request: Request, ahead: Sequence[int]) -> bool:
        """Read one predicted expert of the next layer; False where there is none, or no time for it."""
        layer = request.layer + 1
        if not self._prefetching or layer >= self.spec.layers or not self.spec.has_experts(layer):
            return False
        if request.rows * self.spec.active_experts >= 2 * self.spec.experts:
            ahead = range(self.spec.experts)  # so many rows need nearly all
        wanted = [e for e in ahead if self._slot[layer, e] < 0]
        # As many reads as fit into what a layer leaves free; at least one, which is what a trial measures.
        room = max(1, round(self._spare_s / self._read_s)) if self._read_s else 1
        for expert in wanted[:room]:
            if int(words.newest_request(self.table, self.control)) != request.number:
                return True
            if not self._load(layer, expert, request, ahead):
                return False
            self._fresh[layer, expert] = True
            self._counts["prefetched"] += 1
        return int(words.newest_request(self.table, self.control)) != request.number

    def _load(self, layer: int, expert: int, request: Request, ahead: Sequence[int]) -> bool:
        """Read one expert into a slot. ahead: for a read that nobody waits for, the experts that are as
        welcome in the next layer; False if it would drive out something needed."""
        slot = self._free.pop() if self._free else self._vacate(request, layer if ahead else -1, ahead)
        if slot is None:
            return False
        try:
            self._read(layer, expert, slot)
        except BaseException:
            self._free.append(slot)
            raise
        self._holder[slot] = layer, expert
        self._slot[layer, expert] = slot
        words.place(self.table, self._word(layer, expert), slot * self.slot_bytes)
        self._arrived.set()
        return True

    def _read(self, layer: int, expert: int, slot: int) -> None:
        tensor, began = self._tensors[layer][expert], time.perf_counter()
        start = slot * self.slot_bytes
        size = page_padded(tensor.nbytes)
        view = memoryview(self._memory)[start : start + size]
        try:
            count = self.segments.read(tensor.offset, view)
        except OSError as error:
            raise ModelFileError(
                f"{tensor.name} cannot be read ({error.strerror or error}); check the disk, or copy the "
                "file again"
            ) from None
        if count < tensor.nbytes:
            raise ModelFileError(
                f"found {count} bytes of {tensor.name}, expected {tensor.nbytes}; "
                "the file was cut short while it was open, copy it again"
            )
        if self.streaming.verify and (layer, expert) not in self._verified:
            if hashlib.sha256(view[: tensor.nbytes]).hexdigest() != tensor.sha256:
                raise ChecksumError(
                    f"found other bytes than were written in {tensor.name}, expected its SHA-256; "
                    "copy the file again or convert the model again"
                )
            self._verified.add((layer, expert))
        self._counts["bytes_read"] += size
        self._read_s += (_SMOOTH if self._read_s else 1) * (time.perf_counter() - began - self._read_s)

    def _vacate(self, request: Request, guarded: int, ahead: Sequence[int]) -> int | None:
        """Empty the slot whose expert is worth least, of those that nothing needs.

        guarded: for a read ahead, its layer, whose experts in `ahead` stay too; then None if none may go.
        For a needed expert it waits until one of the layer's own is finished, if it must.
        """
        while not self._closing:
            victim = self._least_worth(request, guarded, ahead)
            if victim is None:
                if guarded >= 0:
                    return None
                time.sleep(_NAP)
                continue
            layer, expert = victim
            slot = int(self._slot[layer, expert])
            words.place(self.table, self._word(layer, expert), words.ABSENT)
            newest = self._newest()
            if newest.number != request.number and newest.layer == layer and expert in newest.experts:
                words.place(self.table, self._word(layer, expert), slot * self.slot_bytes)
                if guarded >= 0:
                    return None
                continue
            self._slot[layer, expert] = -1
            self._fresh[layer, expert] = False
            self._holder[slot] = None
            return slot
        return None

    def _least_worth(self, request: Request, guarded: int, ahead: Sequence[int]) -> tuple[int, int] | None:
        may_go = (self._slot >= 0) & ~self._pinned
        for i, expert in enumerate(request.experts):
            if may_go[request.layer, expert] and not self._is_finished(i, request):
                may_go[request.layer, expert] = False
        if guarded >= 0:
            may_go[guarded, list(ahead)] = False
        layers, experts = np.nonzero(may_go)
        if not len(layers):
            return None
        values = self._policy.values[layers, experts]
        # Of equal worth goes the one whose layer comes last: the layers before this one, backwards.
        turns = (layers - request.layer - 1) % self.spec.layers
        best = int(np.lexsort((-turns, values))[0])
        return int(layers[best]), int(experts[best])

    def _is_finished(self, i: int, request: Request) -> bool:
        """Whether the i-th expert of the request is computed; all are when a newer one came."""
        if self.routes is None:  # nothing runs yet
            return False
        done = bool(words.finished(self.routes, self._counters, i, self._units))
        return done or int(words.newest_request(self.table, self.control)) != request.number

    def _word(self, layer: int, expert: int) -> int:
        return (layer * self.spec.experts + expert) * words.TABLE

    def _pin(self, uses: NDArray[np.float64] | None) -> None:
        """Read the most used experts and keep them. uses [L, E]."""
        count = int(self.streaming.pinned * len(self._free))
        if uses is None or not count:
            return
        for index in np.argsort(-uses, axis=None, kind="stable")[:count].tolist():
            layer, expert = divmod(index, self.spec.experts)
            if self.spec.has_experts(layer):
                self._load(layer, expert, Request(0, 0, 0, [], []), ())
                self._pinned[layer, expert] = True


def slot_bytes(spec: ModelSpec, tensors: dict[str, StoredTensor]) -> int:
    """Bytes of the largest expert, in whole pages."""
    return max(
        page_padded(tensors[expert_name(layer, expert)].nbytes)
        for layer in range(spec.layers)
        if spec.has_experts(layer)
        for expert in range(spec.experts)
    )


def warm_up() -> None:
    """Compile what the store calls beside the program."""
    table: NDArray[np.int64] = np.zeros(16, np.int64)
    words.place(table, 0, int(words.request_words(1)))
    words.newest_request(table, 0)
    words.finished(table, 0, 0, 1)
