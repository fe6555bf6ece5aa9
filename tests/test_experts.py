"""Streamed experts: whatever is evicted, guessed, late or out of order, the bits are those of memory."""

import errno
import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.config import EngineConfig, ModelSpec
from edgert.errors import ChecksumError, ModelFileError
from edgert.experts import ExpertStore
from edgert.flash import FileSource, Reading, Streaming
from edgert.flash.config import POLICIES, PREDICTORS
from edgert.format import StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import expert_name
from edgert.kernels import experts as kernel
from edgert.kernels import program
from edgert.kernels.operations import Run, pack
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import test_blocks

TWINS: bool = numba.config.DISABLE_JIT
SPEC = ModelSpec(
    *("qwen2_moe", 4, 48, 6, 2, 12, 80, 67, 80, 1e-6),
    experts=16,
    active_experts=2,
    expert_width=40,
    shared_width=24,
    dense_layers=(1,),
)
EXPERTS = 3 * SPEC.experts
BUDGETS = {"100%": 48, "50%": 24, "25%": 12, "12.5%": 6}
DEFAULTS = Streaming()
TOKENS = [int(t) for t in inputs.whole("experts", 0, SPEC.vocab - 1, 30)]
PIECES = [17] + [1] * 9 + [4]  # a chunk that needs nearly all experts, single tokens, a few rows


def quant_of(name: str) -> str:
    return ("q4", "q8", "f16", "q3", "f32", "q2")[sum(name.encode()) % 6]


class Memory:
    """A byte array read as a file, by a device of any speed: with a delay, reads end in any order."""

    def __init__(self, weights: Weights, delay: float = 0.0) -> None:
        self._data, self._delay, self._random = weights.data, delay, random.Random(1)
        self.reads: list[int] = []

    def read(self, offset: int, into: memoryview) -> int:
        if self._delay:
            time.sleep(self._random.random() * self._delay)
        self.reads.append(offset)
        into[:] = self._data[offset : offset + len(into)].data
        return len(into)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def weights() -> Weights:
    return inputs.tiny_weights(SPEC, quant_of, "streamed")


@contextmanager
def streamed(
    weights: Weights,
    slots: int,
    streaming: Streaming = DEFAULTS,
    threads: int = 1,
    segments: Memory | None = None,
    shuffle: bool = False,
    reading: Reading = Reading(),  # noqa: B008
) -> Iterator[Forward]:
    """A forward path whose experts are not in `w`: that part of it is filled with 255."""
    source = segments or Memory(weights)
    rest = weights.data.copy()
    for tensor in weights.tensors.values():
        if tensor.role == "expert":
            rest[tensor.offset : tensor.offset + page_padded(tensor.nbytes)] = 255
    order = random.Random(2)
    store = ExpertStore(
        weights.spec,
        weights.tensors,
        source,
        slots,
        streaming,
        reading=reading,
        order=(lambda e: order.sample(e, len(e))) if shuffle else list,
    )
    model = Forward(Weights(weights.spec, rest, weights.tensors), EngineConfig(threads, 80, 32), store)
    try:
        yield model
    finally:
        model.close()


def feed(model: Forward, pieces: list[int]) -> inputs.F32:
    rows, at = [], 0
    for size in pieces:
        rows.append(model.run(TOKENS[at : at + size], outputs=range(size)).copy())
        at += size
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def expected(weights: Weights) -> inputs.F32:
    """The logits of the same model with everything in memory."""
    model = Forward(weights, EngineConfig(1, 80, 32))
    try:
        return feed(model, [1] * sum(PIECES))
    finally:
        model.close()


CHOICES = [
    Streaming(policy=policy, predictor=predictor, prefetch="on")
    for policy in POLICIES
    for predictor in PREDICTORS
]
SOME = [Streaming(), Streaming(policy="score", predictor="history", prefetch="on")]


READINGS = [Reading(1), Reading(3, 4096), Reading(4)]
"""One read at a time; pieces of a page by three threads, which cuts every expert; four experts at a time."""


ALL = [
    *itertools.product(BUDGETS.values(), SOME, READINGS),
    *((*choice, READINGS[n % 3]) for n, choice in enumerate(itertools.product(BUDGETS.values(), CHOICES))),
]


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["sinks", "latent", "greedy"])
def test_experts_of_other_routers_and_with_biases_stream_to_the_same_bits(name: str) -> None:
    weights = inputs.tiny_weights(test_blocks.SPECS[name], quant_of, name)
    model = Forward(weights, EngineConfig(1, 80, 32))
    try:
        expected = feed(model, [1] * sum(PIECES))
    finally:
        model.close()
    for streaming in SOME:
        with streamed(weights, 5, streaming, threads=2, shuffle=True) as model:
            inputs.same(feed(model, PIECES), expected)


@pytest.mark.parametrize(
    ("slots", "streaming", "reading"),
    ALL[9:24:4] if TWINS else ALL,
    ids=lambda v: f"{v.policy}-{v.predictor}-{v.prefetch}" if isinstance(v, Streaming) else None,
)
def test_streamed_equals_resident(
    weights: Weights, expected: inputs.F32, slots: int, streaming: Streaming, reading: Reading
) -> None:
    with streamed(
        weights,
        slots,
        streaming,
        threads=2,
        segments=Memory(weights, 5e-4),
        shuffle=True,
        reading=reading,
    ) as model:
        inputs.same(feed(model, PIECES), expected)
        assert model.store is not None
        totals = model.store.totals()
        assert totals["misses"] > 0
        assert totals["bytes_read"] > 0


@pytest.mark.parametrize("slots", [2, 48])
def test_without_overlap_the_bits_are_the_same(weights: Weights, expected: inputs.F32, slots: int) -> None:
    memory = Memory(weights, 2e-3)
    with streamed(weights, slots, Streaming(overlap=False), segments=memory, reading=Reading(2)) as model:
        inputs.same(feed(model, PIECES[:1] if slots == 2 else PIECES)[:17], expected[:17])
        assert model.store is not None
        assert model.store.totals()["io_wait_s"] > 1e-3  # it waits in Python, and that counts too


def test_two_slots_serve_a_chunk_that_needs_every_expert(weights: Weights, expected: inputs.F32) -> None:
    memory = Memory(weights)
    with streamed(weights, 2, Streaming(predictor="none"), segments=memory) as model:
        inputs.same(feed(model, [17]), expected[:17])
    assert len(memory.reads) == len(set(memory.reads))  # each expert is read once per chunk


def test_with_room_for_all_nothing_is_read_twice(weights: Weights) -> None:
    memory = Memory(weights)
    with streamed(weights, EXPERTS, Streaming(prefetch="on"), segments=memory) as model:
        feed(model, PIECES)
        model.cache.rewind(0)
        before = len(memory.reads)
        assert before == len(set(memory.reads)) <= EXPERTS
        feed(model, PIECES)
        assert model.store is not None
        hits = model.store.totals()["hits"]
    assert len(set(memory.reads)) == len(memory.reads)
    assert hits > 0


def test_idle_work_is_offered_only_while_experts_are_missing(weights: Weights, expected: inputs.F32) -> None:
    offered = []
    with streamed(weights, EXPERTS, Streaming(predictor="none"), segments=Memory(weights, 2e-3)) as model:
        model.waits.idle = lambda: bool(offered.append(1)) or len(offered) % 3 > 0
        inputs.same(feed(model, PIECES), expected)
        assert offered
        model.cache.rewind(0)
        feed(model, PIECES)  # the rest of the experts comes
        offered.clear()
        model.cache.rewind(0)
        inputs.same(feed(model, PIECES), expected)
        assert not offered


def test_whoever_always_has_other_work_does_not_keep_a_chunk_from_its_slots(
    weights: Weights, expected: inputs.F32
) -> None:
    """Two slots do not hold what the chunk needs: only computing frees them for the rest."""
    with streamed(weights, 2, Streaming(predictor="none")) as model:
        model.waits.idle = lambda: True
        inputs.same(feed(model, PIECES), expected)


class Broken(Memory):
    """Fails at the reads whose number is in `fail`, with an error, too few bytes, or a wrong one."""

    def __init__(self, weights: Weights, fail: set[int], how: str) -> None:
        super().__init__(weights, 5e-4)
        self.fail, self._how, self._numbers = fail, how, itertools.count(1)

    def read(self, offset: int, into: memoryview) -> int:
        number = next(self._numbers)
        count = super().read(offset, into)
        if number in self.fail:
            if self._how == "error":
                raise OSError(errno.EIO, "Input/output error")
            if self._how == "flip":
                into[0] ^= 1
                return count
            return 8
        return count


@pytest.mark.parametrize("fail", [{3, 40}] if TWINS else [{1}, {3, 40}, {12, 13, 14, 15}], ids=str)
@pytest.mark.parametrize(
    "reading", READINGS[1:2] if TWINS else READINGS, ids=lambda r: f"{r.readers}x{r.piece}"
)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", r"layers\.\d\.experts\.\d+ cannot be read \(Input/output error\)"),
        ("short", r"found 8 bytes of layers\.\d\.experts\.\d+, expected \d+"),
    ],
)
def test_a_failed_read_is_an_error_with_the_experts_name_and_no_wrong_bits(
    weights: Weights, expected: inputs.F32, how: str, said: str, reading: Reading, fail: set[int]
) -> None:
    segments = Broken(weights, fail, how)
    none_ahead = Streaming(predictor="none")  # what nobody needed is no error
    with streamed(weights, 12, none_ahead, threads=2, segments=segments, reading=reading) as model:
        with pytest.raises(ModelFileError, match=said):
            model.run(TOKENS[:17], outputs=range(17))
        assert model.cache.length == 0
        failures = 0
        rows: list[NDArray[np.float32]] = []
        while len(rows) < len(TOKENS):  # the device recovers: what could not be computed is asked again
            try:
                rows.append(model.run([TOKENS[len(rows)]], outputs=[0])[0].copy())
            except ModelFileError:
                failures += 1
                assert model.cache.length == len(rows)
        assert failures <= len(fail)
        inputs.same(np.stack(rows), expected[: len(rows)])


def test_a_guess_that_cannot_be_read_harms_nobody(weights: Weights, expected: inputs.F32) -> None:
    """Every read ahead fails, and is read again when it is needed."""
    guesses = Guesses(weights)
    with streamed(weights, 12, Streaming(prefetch="on"), segments=guesses) as model:
        assert model.store is not None
        guesses.store = model.store
        inputs.same(feed(model, [1] * sum(PIECES)), expected)
    assert guesses.failed > 0


class Guesses(Memory):
    """Fails reads of experts of another layer than the newest request's."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.store: ExpertStore | None = None
        self.failed = 0
        self._layer = {
            weights.tensors[expert_name(layer, expert)].offset: layer
            for layer in range(SPEC.layers)
            if SPEC.has_experts(layer)
            for expert in range(SPEC.experts)
        }

    def read(self, offset: int, into: memoryview) -> int:
        assert self.store is not None
        if self._layer[offset] != self.store.ring.newest().group:
            self.failed += 1
            raise OSError(errno.EIO, "Input/output error")
        return super().read(offset, into)


class Slow(Memory):
    """Counts the reads in flight; every piece takes as long."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self._lock = threading.Lock()
        self.now = self.most = 0

    def read(self, offset: int, into: memoryview) -> int:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(5e-3)
        with self._lock:
            self.now -= 1
        return super().read(offset, into)


@pytest.mark.parametrize("reading", [Reading(1), Reading(2, 4096), Reading(4)], ids=lambda r: r.readers)
def test_as_many_reads_are_in_flight_as_there_are_readers(
    weights: Weights, expected: inputs.F32, reading: Reading
) -> None:
    slow = Slow(weights)
    with streamed(weights, 24, Streaming(predictor="none"), segments=slow, reading=reading) as model:
        inputs.same(feed(model, [17]), expected[:17])
    assert slow.most == reading.readers


class Gate(Memory):
    """Holds up every read between two bytes, from the second on, until it is let go."""

    def __init__(self, weights: Weights, first: int, last: int) -> None:
        super().__init__(weights)
        self._first, self._last = first, last
        self.count = 0
        self.reached, self.go = threading.Event(), threading.Event()

    def read(self, offset: int, into: memoryview) -> int:
        if self._first <= offset < self._last:
            self.count += 1
            if self.count > 1:
                self.reached.set()
                assert self.go.wait(30)
        return super().read(offset, into)


@pytest.mark.parametrize("right", [False, True], ids=["wrong", "right"])
def test_a_guess_that_proves_wrong_is_read_no_further(weights: Weights, right: bool) -> None:
    guessed = max(range(SPEC.experts), key=lambda e: weights.tensors[expert_name(3, e)].nbytes)
    tensor = weights.tensors[expert_name(3, guessed)]
    pages = page_padded(tensor.nbytes) // 4096
    assert pages >= 4
    gate = Gate(weights, tensor.offset, tensor.offset + tensor.nbytes)
    gate.go.set()
    choices = Streaming(predictor="history", prefetch="on")
    store = ExpertStore(SPEC, weights.tensors, gate, 8, choices, reading=Reading(1, 4096))
    try:
        for _ in range(2):  # it learns that `guessed` follows expert 1 of layer 2 ...
            ask(store, 2, [1])
            ask(store, 3, [guessed])
        for expert in range(8):  # ... and has to give up both
            ask(store, 0, [expert])
        gate.go.clear()
        gate.reached.clear()  # it was, while the guess was learned
        gate.count = 0
        ask(store, 2, [1])
        assert gate.reached.wait(30)  # two pages of the guess are begun
        ask(store, 3, [guessed if right else (guessed + 1) % SPEC.experts], wait=False)
        gate.go.set()
        until_arrived(store)
        assert gate.count == (pages if right else 2)
        assert store.totals()["prefetch_useful"] == right
        assert (store.slots.slot_of[3, guessed] >= 0) == right
    finally:
        store.close()


def ask(store: ExpertStore, layer: int, experts: list[int], wait: bool = True) -> None:
    """What a program would: publish a request for these experts, in a forward of its own."""
    store.begin(1, 0)
    publish(store, layer, experts)
    if wait:
        until_arrived(store)


def until_arrived(store: ExpertStore) -> None:
    end = time.monotonic() + 30
    while not store.arrived:
        assert time.monotonic() < end
        time.sleep(1e-3)


def publish(store: ExpertStore, layer: int, experts: list[int]) -> None:
    routes = np.zeros(64, np.int64)
    busy, chosen = 0, 32
    routes[busy] = len(experts)
    routes[busy + 1 : busy + 1 + len(experts)] = experts
    routes[chosen : chosen + len(experts)] = experts
    f = np.ones(16, np.float32)
    kernel.publish(
        1, layer, SPEC.experts, len(experts), chosen, 0, 0, busy, -1, 0, store.ring.control,
        f, routes, store.ring.table,
    )  # fmt: skip


@pytest.mark.compiled
def test_a_thread_that_waits_for_another_leaves_the_places_of_resident_experts_alone() -> None:
    """Without a store there are no control words: what lies there are the places of experts."""
    c = np.zeros(program.COLUMNS, np.int64)
    fields = {"blocks": 2, "outer": 2, "unit": 2, "busy": 0, "counters": 8, "starts": 4, "control": -1}
    fields |= dict.fromkeys(("gate_biases", "up_biases", "down_biases"), -1)
    for name, value in fields.items():
        c[3 + program.FIELDS[program.EXPERTS].index(name)] = value
    routes = np.zeros(32, np.int64)
    routes[:2] = 1, 0  # one busy expert: number 0
    table, words, none = np.zeros(16, np.int64), np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    reals, f, bytes_ = np.zeros((1, 2), np.float32), np.zeros(64, np.float32), np.zeros(64, np.uint8)
    run = Run(
        code=c[None],
        reals=reals,
        w=bytes_,
        pool=bytes_,
        table=table,
        f=f,
        xq=np.zeros(64, np.int8),
        xs=np.zeros(8, np.float32),
        xn=np.zeros(8, np.int32),
        kv=bytes_,
        spare=bytes_,
        routes=routes,
        rows=none,
        paths=words,
        job=words,
    )
    packed = pack(run)

    routes[8:12] = 1, 1, 1, 1  # all of it is done: compiled now, not while the other thread is awaited
    kernel.run_experts(packed, 0, 0, 1, 0)
    routes[8:12] = 1, 0, 0, 0  # another thread has taken its unit of gate and up ...

    def finish() -> None:
        time.sleep(0.05)  # far longer than it looks before it naps
        routes[9:12] = 1, 1, 1  # ... and is done with that, and with down

    other = threading.Thread(target=finish)
    other.start()
    kernel.run_experts(packed, 0, 0, 1, 0)
    other.join()
    np.testing.assert_array_equal(table, 0)


def test_pinned_experts_that_cannot_be_read_are_an_error(weights: Weights) -> None:
    uses = np.ones((SPEC.layers, SPEC.experts), np.int64)
    with pytest.raises(ModelFileError, match=r"layers\.\d\.experts\.\d+ cannot be read"):
        ExpertStore(
            SPEC, weights.tensors, Broken(weights, {3}, "error"), 12, Streaming(pinned=0.5), uses=uses
        )
    assert not [t for t in threading.enumerate() if t.name.startswith("edgert-flash")]


def test_checksums_of_experts_are_compared_when_they_are_first_read(weights: Weights) -> None:
    import dataclasses
    import hashlib

    tensors: dict[str, StoredTensor] = {
        name: dataclasses.replace(
            t, sha256=hashlib.sha256(weights.data[t.offset : t.offset + t.nbytes].data).hexdigest()
        )
        for name, t in weights.tensors.items()
    }
    hashed = Weights(SPEC, weights.data, tensors)
    with streamed(hashed, EXPERTS, Streaming(verify=True), segments=Memory(weights)) as model:
        feed(model, PIECES)
    with (
        streamed(hashed, EXPERTS, Streaming(verify=True), segments=Broken(weights, {2}, "flip")) as model,
        pytest.raises(ChecksumError, match=r"in layers\.0\.experts\.\d+, expected its SHA-256"),
    ):
        feed(model, PIECES)


def test_a_file_is_read_at_any_page_and_its_end_is_noticed(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "f"
    data = inputs.raw("segments", 3 * 4096)
    path.write_bytes(data.tobytes())
    segments = FileSource(path)
    into = memoryview(mmap.mmap(-1, 2 * 4096))
    try:
        assert segments.read(4096, into) == 8192
        assert bytes(into) == data[4096:].tobytes()
        assert segments.read(2 * 4096, into) == 4096
        path.write_bytes(data[:4096].tobytes())
        assert segments.read(4096, into) == 0
    finally:
        segments.close()
