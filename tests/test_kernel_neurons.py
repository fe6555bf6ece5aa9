"""Single neurons: compiled code equals its twin, and both equal the product over rows16 bit for bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import matmul, neuron_packing, neurons, packing
from edgert.kernels.neuron_packing import NeuronShape
from edgert.kernels.reference import neurons as twins
from tests import kernel_inputs as inputs

NUMBER = {"q8": matmul.Q8, "q4": matmul.Q4}
PRODUCT = {"q8": matmul.matmul_q8, "q4": matmul.matmul_q4}
W_AT = 6
NO_TABLE = np.zeros(1, np.int64)

quants = st.sampled_from(neuron_packing.QUANTS)
shapes = st.tuples(inputs.seeds, st.integers(1, 90), st.sampled_from((32, 96, 192, 512, 544, 1056)))


class Case:
    """A feed-forward of random codes in both layouts, and rows to multiply it with."""

    def __init__(
        self, quant: str, seed: int, neurons_: int, width: int, live: int = 40, rows: int = 1
    ) -> None:
        low, high = (-8, 7) if quant == "q4" else (-127, 127)
        self.quant, self.number, self.count, self.width = quant, NUMBER[quant], neurons_, width
        self.groups, self.inner = -(-width // 32), -(-neurons_ // 32)

        def matrix(name: str, n: int, k: int) -> tuple[Any, Any]:
            codes = inputs.whole((seed, name), low, high, n, k).astype(np.int8)
            scales = inputs.uniform((seed, name, "s"), n, -(-k // 32)).astype(np.float16)
            return codes, scales

        self.up, self.down = matrix("up", neurons_, width), matrix("down", width, neurons_)
        clusters = neuron_packing.pack_clusters(quant, self.up, self.down)
        self.w = np.concatenate([np.full(W_AT, 255, np.uint8), clusters.reshape(-1)])
        slack = 16
        self.x = inputs.whole((seed, "x"), -127, 127, (rows * self.groups + slack) * 32).astype(np.int8)
        self.h = inputs.whole((seed, "h"), -127, 127, rows, self.inner * 32).astype(np.int8)
        self.h[inputs.raw((seed, "mask"), self.h.size).reshape(self.h.shape) > live] = 0
        self.h[:, neurons_:] = 0
        self.xs = np.abs(inputs.uniform((seed, "xs"), rows * max(self.groups, self.inner) + slack))
        self.y = inputs.uniform((seed, "y"), rows, max(self.groups, self.inner) * 32)

    def sums(self, x: Any) -> Any:
        return x.reshape(-1, 32).sum(axis=1, dtype=np.int32)

    def dense(self, matrix: tuple[Any, Any], x: Any, y: Any) -> Any:
        """y + W x by the kernel of rows16."""
        rows, columns = matrix[0].shape
        groups, out = -(-columns // 32), y.copy()
        data = packing.pack(self.quant, *matrix).reshape(-1)
        blocks = -(-rows // 16)
        PRODUCT[self.quant](
            data, 0, groups, 0, blocks, 1, x.reshape(-1), self.xs, self.sums(x), 0, out, 0, out.size
        )
        return out


def live_list(case: Case, most: int = 16) -> Any:
    chosen = np.flatnonzero(case.h[0, : case.count])[:most]
    return np.concatenate([[99], chosen if chosen.size else [0], [0] * neurons.ROWS_AHEAD]).astype(np.int64)


def parts_of_a_cluster(case: Case) -> tuple[int, int]:
    """Bytes before its neurons, and of one."""
    shape = NeuronShape.of(case.quant, case.width)
    return shape.scales, shape.up + shape.down


def up_arguments(case: Case) -> list[Any]:
    spans = NeuronShape.of(case.quant, case.width).spans
    spread = np.zeros((spans + 1) * 512, np.int8)
    neurons.spread(case.x, 0, case.groups, spread, 32)
    listed = live_list(case)
    y = 16 + 4  # work, and some that nothing may touch
    f = np.zeros(y + case.inner * 32, np.float32)
    f[y:] = case.y[0, : case.inner * 32]
    return [
        *(
            case.number,
            case.w,
            W_AT,
            *parts_of_a_cluster(case),
            -1,
            NO_TABLE,
            case.groups,
            listed,
            1,
            listed.size - 1 - neurons.ROWS_AHEAD,
            spread,
            32,
        ),
        *(case.xs, case.sums(case.x), 0, f, 0, y),
    ]


def down_arguments(case: Case, first: int, last: int) -> list[Any]:
    work = (last - first) * 128
    f = np.zeros(work + case.groups * 32, np.float32)
    f[work:] = case.y[0, : case.groups * 32]
    h = case.h[0].copy()
    return [
        *(case.number, case.w, W_AT, -1, NO_TABLE, case.groups, case.inner, first, last),
        *(h, case.xs, case.sums(h), 0),
        *(f, 0, work, np.zeros(85, np.int64), 5),
    ]


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
def test_packed_neurons_unpack_to_what_they_were(quant: str) -> None:
    case = Case(quant, 1, 70, 200)
    up, down = neuron_packing.unpack(quant, case.w[W_AT:], 70, 200)

    def floats(matrix: tuple[Any, Any]) -> Any:
        codes, scales = matrix
        spread = np.repeat(scales.astype(np.float32), 32, axis=1)[:, : codes.shape[1]]
        return codes * spread

    assert np.array_equal(up, floats(case.up))
    assert np.array_equal(down, floats(case.down))
    assert case.w.size - W_AT == neuron_packing.stored_bytes(quant, 70, 200)


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
def test_a_long_unit_gives_what_its_rows_give_one_by_one(quant: str) -> None:
    case = Case(quant, 3, 90, 1056, live=200)
    listed = live_list(case, 64)
    count = listed.size - 1 - neurons.ROWS_AHEAD
    assert count > 48
    found = []
    for size in (count, 1):
        arguments = up_arguments(case)
        arguments[16] = np.zeros(64 + case.inner * 32, np.float32)
        arguments[8], arguments[18] = listed, 64
        for first in range(1, 1 + count, size):
            arguments[9:11] = first, size
            neurons.add_up(*arguments)
        found.append(arguments[16][64:])
    inputs.same(*found)
    assert np.count_nonzero(found[0]) == count


@inputs.some
@given(quant=quants, shape=shapes)
def test_a_row_of_up_gives_what_the_whole_matrix_gives(quant: str, shape: Any) -> None:
    case = Case(quant, *shape)
    arguments = up_arguments(case)
    neurons.add_up(*arguments)
    expected = case.dense(case.up, case.x[: case.groups * 32], case.y[0, : case.inner * 32])
    chosen = arguments[8][1 : -neurons.ROWS_AHEAD]
    inputs.same(arguments[16][arguments[18] :][chosen], expected[chosen])


@inputs.some
@given(
    quant=quants, shape=shapes, live=st.sampled_from((0, 20, 255)), cut=st.tuples(*[st.integers(0, 9)] * 2)
)
def test_columns_of_down_give_what_the_whole_matrix_gives(
    quant: str, shape: Any, live: int, cut: Any
) -> None:
    case = Case(quant, *shape, live=live)
    slices = NeuronShape.of(quant, case.width).slices
    first, last = sorted(c % (slices + 1) for c in cut)
    first, last = (first, last) if first < last else (0, slices)
    arguments = down_arguments(case, first, last)
    neurons.add_down(*arguments)
    before = case.y[0, : case.groups * 32]
    expected = before.copy()
    span = slice(first * 128, last * 128)
    expected[span] = case.dense(case.down, case.h[0], before)[span]
    inputs.same(arguments[13][arguments[15] :], expected)


@pytest.mark.compiled
@inputs.few
@given(quant=quants, shape=shapes)
def test_compiled_neurons_equal_their_twins(quant: str, shape: Any) -> None:
    case = Case(quant, *shape)
    slices = NeuronShape.of(quant, case.width).slices
    for kernel, twin, arguments, y in (
        (neurons.add_up, twins.add_up, up_arguments(case), 18),
        (neurons.add_down, twins.add_down, down_arguments(case, 0, slices), 15),
    ):
        ours = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        theirs = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        kernel(*ours)
        twin(*theirs)
        f = 16 if y == 18 else 13
        inputs.same(ours[f][ours[y] :], theirs[f][theirs[y] :])


@inputs.few
@given(quant=quants, shape=shapes)
def test_neurons_come_back_in_the_order_of_rows16(quant: str, shape: Any) -> None:
    case = Case(quant, *shape)
    size, sizes = packing.RECORD_BYTES[quant], NeuronShape.of(quant, case.width)
    up, down = packing.pack(quant, *case.up), packing.pack(quant, *case.down)
    for block in range(len(up)):
        out = np.zeros(4 + sizes.spans * 16 * size, np.uint8)
        neurons.block_of_up(case.number, case.w, W_AT, *parts_of_a_cluster(case), case.groups, block, out, 4)
        # Rows past the last hold other bytes for a weight of 0 * scale 0 = 0.
        found = packing.unpack(quant, out[4 : 4 + case.groups * size], 16, case.width)
        assert np.array_equal(found, packing.unpack(quant, up[block].reshape(-1), 16, case.width))
    for which in range(sizes.slices):
        out = np.zeros(4 + 8 * case.inner * size, np.uint8)
        neurons.slice_of_down(case.number, case.w, W_AT, case.groups, case.inner, which, out, 4)
        rows = min(128, case.width - which * 128)
        found = packing.unpack(quant, out[4:], 128, case.count)[:rows]
        expected = packing.unpack(quant, down[which * 8 : which * 8 + 8].reshape(-1), rows, case.count)
        assert np.array_equal(found, expected)


@inputs.some
@given(
    seed=inputs.seeds,
    kind=st.integers(0, 3),
    threshold=st.sampled_from((0.0, 0.1, 0.5)),
    flavour=inputs.flavours,
)
def test_activations_below_the_threshold_are_zero(
    seed: int, kind: int, threshold: float, flavour: str
) -> None:
    g = inputs.floats((seed, "g"), flavour, 64, large=1e3)
    whole, cut = g.copy(), g.copy()
    neurons.activate(kind, np.float32(0), whole, 0, 64)
    neurons.activate(kind, np.float32(threshold), cut, 0, 64)
    inputs.same(cut, np.where(np.abs(whole) >= np.float32(threshold), whole, np.float32(0)))


def test_neurons_that_fire_in_any_row_are_listed() -> None:
    g = np.zeros((3, 100), np.float32)
    g[0, 5] = 1
    g[2, [4, 5, 69]] = -1
    g[1, 70] = 9  # past the width
    routes = np.full(90, 7, np.int64)
    neurons.list_live(g.reshape(-1), 0, 100, 3, 70, routes, 2)
    assert routes[2:6].tolist() == [3, 4, 5, 69]
    neurons.list_live(g.reshape(-1), 0, 100, 1, 70, routes, 2)
    assert routes[2:4].tolist() == [1, 5]
