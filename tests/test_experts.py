"""Streamed experts: whatever is evicted, guessed, late or out of order, the bits are those of memory."""

import errno
import random
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
from edgert.experts import ExpertStore, FileSegments, Streaming
from edgert.experts.config import POLICIES, PREDICTORS
from edgert.format import StoredTensor
from edgert.format.layout import page_padded
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs

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
    return ("q4", "q8", "f16", "f32")[sum(name.encode()) % 4]


class Memory:
    """Segments over a byte array, as a device of any speed; counts and reorders nothing by itself."""

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
) -> Iterator[Forward]:
    """A forward path whose experts are not in `w`: that part of it is filled with 255."""
    source = segments or Memory(weights)
    rest = weights.data.copy()
    for tensor in weights.tensors.values():
        if tensor.role == "expert":
            rest[tensor.offset : tensor.offset + page_padded(tensor.nbytes)] = 255
    order = random.Random(2)
    store = ExpertStore(
        SPEC,
        weights.tensors,
        source,
        slots,
        streaming,
        order=(lambda e: order.sample(e, len(e))) if shuffle else list,
    )
    model = Forward(Weights(SPEC, rest, weights.tensors), EngineConfig(threads, 80, 32), store)
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


@pytest.mark.parametrize("slots", list(BUDGETS.values())[-2:] if TWINS else BUDGETS.values())
@pytest.mark.parametrize(
    "streaming", SOME if TWINS else CHOICES, ids=lambda s: f"{s.policy}-{s.predictor}-{s.prefetch}"
)
def test_streamed_equals_resident(
    weights: Weights, expected: inputs.F32, slots: int, streaming: Streaming
) -> None:
    with streamed(
        weights, slots, streaming, threads=2, segments=Memory(weights, 5e-4), shuffle=True
    ) as model:
        inputs.same(feed(model, PIECES), expected)
        assert model.store is not None
        totals = model.store.totals()
        assert totals["expert_misses"] > 0
        assert totals["bytes_read"] > 0


@pytest.mark.parametrize("slots", [2, 48])
def test_without_overlap_the_bits_are_the_same(weights: Weights, expected: inputs.F32, slots: int) -> None:
    with streamed(weights, slots, Streaming(overlap=False)) as model:
        inputs.same(feed(model, PIECES[:1] if slots == 2 else PIECES)[:17], expected[:17])


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
        hits = model.store.totals()["expert_hits"]
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


class Broken(Memory):
    """Fails at the reads whose number is in `fail`, with an error or with too few bytes."""

    def __init__(self, weights: Weights, fail: set[int], how: str) -> None:
        super().__init__(weights)
        self.fail, self._how, self._count = fail, how, 0

    def read(self, offset: int, into: memoryview) -> int:
        self._count += 1
        count = super().read(offset, into)
        if self._count in self.fail:
            if self._how == "error":
                raise OSError(errno.EIO, "Input/output error")
            if self._how == "flip":
                into[0] ^= 1
                return count
            return count // 2
        return count


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", r"layers\.\d\.experts\.\d+ cannot be read \(Input/output error\)"),
        ("short", r"found \d+ bytes of layers\.\d\.experts\.\d+, expected \d+"),
    ],
)
def test_a_failed_read_is_an_error_with_the_experts_name_and_no_wrong_bits(
    weights: Weights, expected: inputs.F32, how: str, said: str
) -> None:
    segments = Broken(weights, {3, 40}, how)
    with streamed(weights, 12, Streaming(), threads=2, segments=segments) as model:
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
        assert failures <= 1
        inputs.same(np.stack(rows), expected[: len(rows)])


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
    segments = FileSegments(path)
    into = memoryview(mmap.mmap(-1, 2 * 4096))
    try:
        assert segments.read(4096, into) == 8192
        assert bytes(into) == data[4096:].tobytes()
        assert segments.read(2 * 4096, into) == 4096
        path.write_bytes(data[:4096].tobytes())
        assert segments.read(4096, into) == 0
    finally:
        segments.close()
