"""Neurons from flash: whatever gives way, comes late or out of order, the bits are those of memory."""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import edgert
from edgert.config import EngineConfig
from edgert.errors import MemoryBudgetError, ModelFileError, OptionError
from edgert.flash import FileSource, Source, Streaming
from edgert.format import ErtFile
from edgert.kernels import neuron_packing, neuron_reads, neurons
from edgert.model.forward import Forward
from edgert.neurons import NeuronStore, neuron_parts, open_streamed
from edgert.neurons.store import HALF_LIFE, Reads
from edgert.planner import BASE_BYTES, buffer_bytes, cache_bytes, plan
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import test_kernel_neurons, tiny_models
from tests.neuron_weights import one_by_one
from tests.test_neurons import SPECS, both

TWINS: bool = numba.config.DISABLE_JIT
MIB = 1 << 20
TOKENS = [int(t) for t in inputs.whole("flash", 0, 60, 48)]
PIECES = [17] + [1] * 12 + [4, 8, 1, 1]
"""Rows of forwards: a chunk that reads whole layers, single tokens, and a few rows at once."""
ALONE, FAR = Reads(gap=-1, piece=4096), Reads(gap=1 << 20, longest=1 << 20)
"""Every neuron for itself in pieces of a page; all that lies between two neurons read with them."""


class Memory:
    """A byte array read as a file, slowly: reads end in any order. What is `bad` fails or comes short."""

    def __init__(self, data: Any, delay: float = 0.0) -> None:
        self._data, self._delay, self._random = data, delay, random.Random(1)
        self.bad: Callable[[int], int | OSError | None] = lambda offset: None
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, into: memoryview) -> int:
        self.reads.append((offset, len(into)))
        if self._delay:
            time.sleep(self._random.random() * self._delay)
        found = self.bad(offset)
        if isinstance(found, OSError):
            raise found
        into[:] = self._data[offset : offset + len(into)].data
        return len(into) if found is None else found

    def close(self) -> None:
        pass


@contextmanager
def streamed(
    weights: Weights,
    source: Source,
    slots: int,
    streaming: Streaming = Streaming(),  # noqa: B008
    reads: Reads = Reads(),  # noqa: B008
    threads: int = 1,
) -> Iterator[Forward]:
    """A forward path whose neurons are not in its weights: that part of them is filled with 255."""
    rest = weights.data.copy()
    for tensor in weights.tensors.values():
        if tensor.role == "neurons":
            rest[tensor.offset : tensor.offset + tensor.nbytes] = 255
    store = NeuronStore(weights.spec, weights.tensors, source, slots, streaming, reads)
    held = Weights(weights.spec, rest, weights.tensors, store.layers)
    with closing(Forward(held, EngineConfig(threads, 80, 32), store)) as model:
        yield model


def feed(model: Forward, pieces: list[int]) -> inputs.F32:
    rows, at = [], 0
    for size in pieces:
        rows.append(model.run(TOKENS[at : at + size], outputs=range(size)).copy())
        at += size
    return np.concatenate(rows)


def resident(weights: Weights) -> inputs.F32:
    with closing(Forward(weights, EngineConfig(1, 80, 32))) as model:
        return feed(model, PIECES)


def totals(model: Forward) -> dict[str, float]:
    assert model.store is not None
    return model.store.totals()


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[[Weights], Path]:
    def write(weights: Weights) -> Path:
        (tmp_path / "weights").write_bytes(weights.data.tobytes())
        return tmp_path / "weights"

    return write


CASES = [
    *[(name, quant, 1.0, Reads(), 1) for name in SPECS for quant in ("q8", "q4")],
    *[("small", "q4", share, Reads(), 3) for share in (1.0, 1.3, 2.0)],
    ("odd", "q8", 1.2, ALONE, 2),
    ("wide", "q4", 1.2, FAR, 2),
]


@pytest.mark.parametrize(
    ("name", "quant", "share", "reads", "threads"), [("small", "q4", 1.0, ALONE, 1)] if TWINS else CASES
)
def test_neurons_from_a_file_give_the_bits_of_memory(
    name: str, quant: str, share: float, reads: Reads, threads: int, file_of: Callable[[Weights], Path]
) -> None:
    _, weights = both(name, quant)
    slots = int(share * weights.spec.ffn_width)
    with streamed(weights, FileSource(file_of(weights)), slots, reads=reads, threads=threads) as model:
        inputs.same(feed(model, PIECES), resident(weights))
        found = totals(model)
    assert found["hits"] > 0
    assert found["misses"] > 0
    assert found["bytes_read"] >= found["reads"] * 512 > 0


@pytest.mark.parametrize("overlap", [True, False])
def test_late_neurons_in_any_order_change_no_bit(overlap: bool) -> None:
    _, weights = both("small", "q4")
    slow = Memory(weights.data, 2e-3)
    with streamed(weights, slow, 80, Streaming(overlap=overlap), ALONE, threads=2) as model:
        inputs.same(feed(model, PIECES), resident(weights))
        assert totals(model)["io_wait_s"] > 1e-3


def test_a_tree_takes_the_neurons_that_fire_in_any_of_its_rows(file_of: Callable[[Weights], Path]) -> None:
    _, weights = both("small", "q8")
    for rows in (5, 12):
        parents = [-1, 0, 0, 1, 2, 2, 3, 3, -1, 8, 8, 10][:rows]
        found = []
        with (
            streamed(weights, FileSource(file_of(weights)), 72) as ours,
            closing(Forward(weights, EngineConfig(1, 80, 32))) as theirs,
        ):
            for model in (ours, theirs):
                model.run(TOKENS[:5])
                found.append(model.run(TOKENS[5 : 5 + rows], parents=parents, outputs=range(rows)).copy())
        inputs.same(*found)


def test_thresholds_apply_to_neurons_from_flash(file_of: Callable[[Weights], Path]) -> None:
    _, weights = both("small", "q4")
    config = EngineConfig(1, 80, 32, thresholds=(0.5, 0.25))
    store = NeuronStore(weights.spec, weights.tensors, FileSource(file_of(weights)), 80, Streaming())
    held = Weights(weights.spec, weights.data, weights.tensors, store.layers)
    with closing(Forward(held, config, store)) as ours, closing(Forward(weights, config)) as theirs:
        found = feed(ours, PIECES)
        inputs.same(found, feed(theirs, PIECES))
    assert not np.array_equal(found, resident(weights))


def test_predictors_go_with_neurons_from_flash(file_of: Callable[[Weights], Path]) -> None:
    """Gates are in memory, those that are expected are computed, and what fires of them is read."""
    dense, _ = both("small", "q4")
    weights = one_by_one(dense, (32, 0), np.zeros(dense.spec.ffn_width))
    config = EngineConfig(1, 80, 32, predict=True)
    store = NeuronStore(weights.spec, weights.tensors, FileSource(file_of(weights)), 80, Streaming())
    held = Weights(weights.spec, weights.data, weights.tensors, store.layers)
    with closing(Forward(held, config, store)) as ours, closing(Forward(weights, config)) as theirs:
        found = feed(ours, PIECES)
        inputs.same(found, feed(theirs, PIECES))
        assert 0 < ours.gated[0] < ours.gated[1]
    assert not np.array_equal(found, resident(weights))


def test_a_chunk_reads_each_layer_once_and_in_order() -> None:
    _, weights = both("small", "q4")
    memory = Memory(weights.data)
    with streamed(weights, memory, 72) as model:
        memory.reads.clear()
        model.run(TOKENS[:17])
    tensors = [t for t in weights.tensors.values() if t.role == "neurons"]
    assert [offset for offset, _ in memory.reads] == [tensor.offset for tensor in tensors]
    assert sum(size for _, size in memory.reads) >= sum(tensor.nbytes for tensor in tensors)


def test_what_lies_between_is_read_with_its_neighbours() -> None:
    _, weights = both("small", "q4")
    reads = {}
    for name, way in (("alone", ALONE), ("far", FAR)):
        memory = Memory(weights.data)
        with streamed(weights, memory, 72, reads=way) as model:
            memory.reads.clear()
            model.run(TOKENS[:1])
            reads[name] = len(memory.reads)
            missed = totals(model)["misses"]
    assert reads["alone"] == missed > reads["far"] == weights.spec.layers


@pytest.mark.parametrize("found", [OSError(5, "Input/output error"), 100])
def test_what_cannot_be_read_ends_the_forward_with_its_name(found: Any) -> None:
    _, weights = both("small", "q4")
    memory = Memory(weights.data)
    tensor = weights.tensors["layers.1.neurons"]
    with streamed(weights, memory, 72, reads=ALONE, threads=2) as model:
        memory.bad = lambda at: found if tensor.offset <= at < tensor.offset + tensor.nbytes else None
        said = "cannot be read" if isinstance(found, OSError) else "found 100 bytes of"
        for rows, name in ((1, r"neuron \d+ of layers\.1\.neurons"), (17, r"layers\.1\.neurons")):
            with pytest.raises(ModelFileError, match=name) as caught:
                model.run(TOKENS[:rows], outputs=[0])
            assert said in str(caught.value)
            assert model.cache.length == 0
        memory.bad = lambda at: None
        inputs.same(feed(model, PIECES), resident(weights))


def test_a_file_cut_short_is_an_error_of_its_neurons(file_of: Callable[[Weights], Path]) -> None:
    _, weights = both("small", "q4")
    path = file_of(weights)
    with streamed(weights, FileSource(path), 72) as model:
        with path.open("r+b") as file:
            file.truncate(weights.tensors["layers.1.neurons"].offset)
        with pytest.raises(ModelFileError, match=r"found 0 bytes of neurons? .* of layers\.1\.neurons"):
            model.run(TOKENS[:1])


def test_the_least_used_of_the_slots_looked_at_goes() -> None:
    _, weights = both("small", "q4")
    with streamed(weights, Memory(weights.data), 100) as model:
        feed(model, PIECES)
        store = model.store
        assert isinstance(store, NeuronStore)
        table, control = store.table, store.control
        owners = table[int(table[control + neuron_reads.OWNERS]) :][:100]
        there = np.flatnonzero(table[:control] >= 0)
        assert sorted(owners[owners >= 0]) == there.tolist()  # each in one slot, and no other has a place
        counts = table[int(table[control + neuron_reads.COUNTS]) :][:control]
        assert counts[there].mean() > counts.mean()
        before = counts.sum()
        for _ in range(HALF_LIFE):
            store.begin(1, 0)
        assert counts.sum() < 0.6 * before


def test_the_hottest_are_pinned(tmp_path: Path) -> None:
    _, weights = both("small", "q4")
    with streamed(weights, Memory(weights.data), 72 + 64, Streaming(pinned=0.5)) as model:
        inputs.same(feed(model, PIECES), resident(weights))
        store = model.store
        assert isinstance(store, NeuronStore)
        assert store.pinned == 64  # a cluster of each layer
        places = store.table[: store.control].reshape(2, -1)
        assert (places[:, :32] >= 0).all()
    path = converted(tmp_path)
    with ErtFile.open(path) as file, pytest.raises(OptionError, match="does not have the neurons that fire"):
        open_streamed(file, 1000, Streaming(pinned=0.5))


@pytest.mark.compiled
def test_kernels_take_neurons_from_where_the_table_says() -> None:
    for quant in neuron_packing.QUANTS:
        case = test_kernel_neurons.Case(quant, 3, 70, 544)
        sizes = neuron_packing.NeuronShape.of(quant, 544)
        scales, bundles = neuron_packing.parts(quant, case.w[test_kernel_neurons.W_AT :], 544)
        order = np.random.default_rng(1).permutation(len(bundles))
        halves = scales.astype(np.float16).view(np.uint8).reshape(-1)
        pool = np.concatenate([halves, bundles[order].reshape(-1)])
        table = np.full(4 + len(bundles), -1, np.int64)
        table[4 + order] = halves.size + np.arange(len(bundles)) * (sizes.up + sizes.down)
        up, down = test_kernel_neurons.up_arguments, test_kernel_neurons.down_arguments
        for make, more, kernel, f, y in (
            (up, (), neurons.add_up, 16, 18),
            (down, (0, sizes.slices), neurons.add_down, 13, 15),
        ):
            expected, found = make(case, *more), make(case, *more)
            at = 5 if kernel is neurons.add_up else 3
            found[1], found[2], found[at], found[at + 1] = pool, 0, 4, table
            kernel(*expected)
            kernel(*found)
            inputs.same(found[f][found[y] :], expected[f][expected[y] :])


# ---- files and budgets -----------------------------------------------------------------------


def converted(folder: Path) -> Path:
    tiny_models.write_folder(folder / "source", "llama_relu2")
    edgert.convert(folder / "source", folder / "m.ert", "q4", sparsity="exact")
    return folder / "m.ert"


def budget(path: Path, slots: int) -> int:
    """Bytes of --ram that leave room for just so many neurons."""
    with ErtFile.open(path) as file:
        config, parts = plan(file.spec, file.size), neuron_parts(file.spec, file.tensors)
        rest = file.size - parts.nbytes + parts.beside
        fixed = BASE_BYTES + cache_bytes(file.spec, config) + buffer_bytes(file.spec, config)
        return fixed + rest + slots * parts.slot


@pytest.fixture
def large_beside_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What streaming takes beside is more than the whole of a tiny model: it is not counted here."""
    monkeypatch.setattr("edgert.kernels.execute.is_cached", lambda *kind: True)
    plain = neuron_parts
    for module in ("edgert.neurons", __name__):
        monkeypatch.setattr(
            f"{module}.neuron_parts", lambda spec, tensors: replace(plain(spec, tensors), beside=0)
        )


@pytest.mark.usefixtures("large_beside_small")
def test_a_budget_too_small_for_all_neurons_streams_them(
    tmp_path: Path, cli: Callable[..., inputs.Any]
) -> None:
    path = converted(tmp_path)
    with edgert.load(path) as model:
        width = model.spec.ffn_width
        expected = model.generate([1, 5, 7], max_tokens=20)
        assert "neuron_hits" not in expected.stats
    with edgert.load(path, ram=budget(path, width + 3)) as model:
        assert model.config.slots == width + 3
        found = model.generate([1, 5, 7], max_tokens=20)
    assert found.tokens == expected.tokens
    assert found.stats["neuron_slots"] == width + 3
    assert found.stats["neuron_misses"] > 0
    assert found.stats["bytes_read"] >= 512 * found.stats["reads"] > 0
    with edgert.load(path, ram=budget(path, 2 * width), draft="lookup") as model:
        drafted = model.generate([1, 5, 7], max_tokens=20)
    assert drafted.tokens == expected.tokens
    done = cli("run", path, "-p", "One", "-n", 5, "--json", "--ram", budget(path, width))
    assert json.loads(done.out)["stats"]["neuron_misses"] > 0
    with pytest.raises(MemoryBudgetError, match=r"this needs .* weights without neurons .* give at least"):
        edgert.load(path, ram=budget(path, width) - 1)
    with pytest.raises(OptionError, match=r"policy is 'score', but .* has no experts"):
        edgert.load(path, ram=budget(path, width), streaming=Streaming(policy="score"))
