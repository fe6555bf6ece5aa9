"""Matrix products: compiled code equals its twin bit for bit, and both are close to exact sums."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import matmul
from edgert.kernels.reference import matmul as twins
from tests import kernel_inputs as inputs

QUANTISED = ("q8", "q4m", "q4", "q4s", "q3", "q2")
FLOAT = ("f32", "f16")


def product(module: Any, quant: str) -> Any:
    """The function of a module that multiplies a matrix of this type."""
    if quant in twins.SMALL:
        return partial(module.matmul_small, twins.SMALL.index(quant))
    return getattr(module, f"matmul_{quant}")


def quantised_case(quant: str, seed: int, flavour: str, groups: int, blocks: int, rows: int) -> list[Any]:
    """Arguments of matmul_q8 or matmul_q4 with every offset away from 0 and nothing aligned."""
    w_at, x_at, y_at, stride = 6, 3, 5, 16 * blocks + 7
    weights = inputs.weight_bytes(quant, (seed, "w"), blocks, groups, flavour)
    xq = inputs.whole((seed, "x"), -127, 127, (x_at + rows * groups) * 32).astype(np.int8)
    if flavour == "sparse":
        xq[inputs.raw((seed, "mask"), xq.size) > 40] = 0
    xs = np.abs(inputs.floats((seed, "xs"), flavour, x_at + rows * groups))
    xn = xq.reshape(-1, 32).sum(axis=1, dtype=np.int32)
    y = inputs.floats((seed, "y"), flavour, y_at + rows * stride + 16)
    w = np.concatenate([np.full(w_at, 255, np.uint8), weights])
    return [w, w_at, groups, 0, blocks, rows, xq, xs, xn, x_at, y, y_at, stride]


def float_case(quant: str, seed: int, flavour: str, groups: int, blocks: int, rows: int) -> list[Any]:
    """Arguments of matmul_f32 or matmul_f16."""
    w_at, x_at, x_stride, y_at, stride = 10, 7, groups * 32 + 3, 5, 16 * blocks + 7
    weights = inputs.weight_bytes(quant, (seed, "w"), blocks, groups, flavour)
    x = inputs.floats((seed, "x"), flavour, x_at + rows * x_stride + 32)
    y = inputs.floats((seed, "y"), flavour, y_at + rows * stride + 16)
    w = np.concatenate([np.full(w_at, 255, np.uint8), weights])
    return [w, w_at, groups, 0, blocks, rows, x, x_at, x_stride, y, y_at, stride]


def case_of(quant: str, *rest: Any) -> list[Any]:
    return (quantised_case if quant in QUANTISED else float_case)(quant, *rest)


shapes = st.tuples(inputs.seeds, inputs.flavours, st.integers(1, 5), st.integers(1, 4), st.integers(1, 19))


@pytest.mark.compiled
@pytest.mark.parametrize("quant", inputs.QUANTS)
@inputs.some
@given(shape=shapes, cut=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_compiled_products_equal_their_twins(quant: str, shape: Any, cut: tuple[int, int]) -> None:
    arguments = case_of(quant, *shape)
    blocks = shape[3]
    first, last = sorted(min(c, blocks) for c in cut)
    arguments[3:5] = (first, last) if first < last else (0, blocks)
    inputs.agree(product(matmul, quant), product(twins, quant), *arguments)


@pytest.mark.compiled
@pytest.mark.parametrize("quant", QUANTISED)
def test_extreme_integers_do_not_saturate(quant: str) -> None:
    arguments = quantised_case(quant, 1, "plain", 3, 1, 9)
    w, w_at, xq, xn = arguments[0], arguments[1], arguments[6], arguments[8]
    records = w[w_at:].reshape(-1, inputs.RECORD[quant])
    for weight in (0x00, 0x0F, 0xF0, 0xFF, 0x7F, 0x81, 0x80):  # 0x80: what no converter writes
        for x in (-127, 127):
            records[:, : {"q8": 512, "q3": 192, "q2": 128}.get(quant, 256)] = weight
            xq[:] = x
            xn[:] = 32 * x
            inputs.agree(product(matmul, quant), product(twins, quant), *arguments)


def _cancelled(quant: str, w: inputs.U8, w_at: int, groups: int, n: int, x: inputs.F64) -> float:
    """What q4m adds and takes away again: value times scale and the minimum round separately."""
    if quant != "q4m":
        return 0.0
    records = w[w_at:][: (n // 16 + 1) * groups * 320].reshape(-1, groups, 320)[n // 16]
    minimums = records[:, 288:].copy().view(np.float16)[:, n % 16].astype(np.float64)
    return 2 * float((np.abs(minimums) * np.abs(x).reshape(groups, 32).sum(axis=1)).sum())


@pytest.mark.parametrize("quant", QUANTISED)
@inputs.few
@given(
    shape=st.tuples(inputs.seeds, inputs.flavours, st.integers(1, 3), st.integers(1, 2), st.integers(1, 9))
)
def test_quantised_products_are_close_to_exact(quant: str, shape: Any) -> None:
    """Each group adds its exact integer, so G + 2 roundings of 2**-24 of the sum of magnitudes."""
    arguments = quantised_case(quant, *shape)
    w, w_at, groups, _, blocks, rows, xq, xs, _, x_at, y, y_at, stride = arguments
    before = y.astype(np.float64)
    product(matmul, quant)(*arguments)
    weights = inputs.stored_matrix(quant, w, w_at, groups, blocks * 16, groups * 32)
    untouched = np.ones(y.size, bool)
    for t in range(rows):
        span = slice((x_at + t * groups) * 32, (x_at + (t + 1) * groups) * 32)
        x = xq[span].astype(np.float64) * np.repeat(xs[x_at + t * groups :][:groups], 32)
        for n in range(blocks * 16):
            at = y_at + t * stride + n
            untouched[at] = False
            products = (weights[n] * x).reshape(groups, 32).sum(axis=1)
            size = abs(before[at]) + np.abs(products).sum() + _cancelled(quant, w, w_at, groups, n, x)
            expected = before[at] + products.sum()
            assert abs(y[at] - expected) <= (2 * groups + 2) * 2.0**-24 * size + 1e-38
    inputs.same(y[untouched], before.astype(np.float32)[untouched])


@pytest.mark.parametrize("quant", FLOAT)
@inputs.few
@given(
    shape=st.tuples(inputs.seeds, inputs.flavours, st.integers(1, 3), st.integers(1, 2), st.integers(1, 5))
)
def test_float_products_are_close_to_exact(quant: str, shape: Any) -> None:
    """8 G fused steps per chain, two sums of chains, one addition to y."""
    arguments = float_case(quant, *shape)
    w, w_at, groups, _, blocks, rows, x, x_at, x_stride, y, y_at, stride = arguments
    before = y.astype(np.float64)
    product(matmul, quant)(*arguments)
    weights = inputs.stored_matrix(quant, w, w_at, groups, blocks * 16, groups * 32)
    untouched = np.ones(y.size, bool)
    for t in range(rows):
        row = x[x_at + t * x_stride :][: groups * 32].astype(np.float64)
        for n in range(blocks * 16):
            at = y_at + t * stride + n
            untouched[at] = False
            products = weights[n] * row
            size = abs(before[at]) + np.abs(products).sum()
            expected = before[at] + products.sum()
            assert abs(y[at] - expected) <= (8 * groups + 4) * 2.0**-24 * size + 1e-38
    inputs.same(y[untouched], before.astype(np.float32)[untouched])


@pytest.mark.parametrize("quant", inputs.QUANTS)
@inputs.some
@given(seed=inputs.seeds, groups=st.integers(1, 4), rows=st.integers(2, 19))
def test_a_row_does_not_depend_on_the_rows_beside_it(quant: str, seed: int, groups: int, rows: int) -> None:
    together = case_of(quant, seed, "plain", groups, 2, rows)
    kernel = product(matmul, quant)
    alone = [a.copy() if isinstance(a, np.ndarray) else a for a in together]
    kernel(*together)
    for t in range(rows):
        one = list(alone)
        one[5] = 1
        if quant in QUANTISED:
            one[9] += t * groups
        else:
            one[7] += t * one[8]
        one[-2] += t * one[-1]
        kernel(*one)
    inputs.same(alone[-3], together[-3])


@pytest.mark.compiled
@pytest.mark.parametrize("quant", QUANTISED)
@pytest.mark.parametrize("tiling", [(1, 0), (2, 1), (4, 1000), (8, 3)])
def test_the_tiling_changes_no_bit(quant: str, tiling: tuple[int, int]) -> None:
    kernel = product(matmul, quant)
    for rows in (1, 7, 15):
        plain = quantised_case(quant, rows, "outlier", 5, 3, rows)
        tiled = [a.copy() if isinstance(a, np.ndarray) else a for a in plain]
        kernel(*plain)
        kernel(*tiled, *tiling)
        inputs.same(tiled[-3], plain[-3])


@pytest.mark.parametrize("quant", inputs.QUANTS)
def test_zero_padding_adds_nothing(quant: str) -> None:
    """K = 40 padded to 64, N = 20 padded to 32: the padded rows are +0 and the sums those of K."""
    arguments = case_of(quant, 4, "plain", 2, 2, 3)
    records = arguments[0][arguments[1] :].reshape(2, 2, -1)
    for n in range(32):
        for k in range(64):
            if n < 20 and k < 40:
                continue
            _set_zero(quant, records[n // 16, k // 32], n % 16, k % 32)
    y = arguments[-3]
    y[:] = 0
    product(matmul, quant)(*arguments)
    rows = [y[arguments[-2] + t * arguments[-1] :][:32] for t in range(3)]
    w = inputs.stored_matrix(quant, arguments[0], arguments[1], 2, 20, 40)
    for t, row in enumerate(rows):
        inputs.same(row[20:], np.zeros(12, np.float32))
        np.testing.assert_allclose(row[:20], w @ _inputs_row(quant, arguments, t)[:40], rtol=1e-4, atol=1e-4)


def _set_zero(quant: str, record: inputs.U8, row: int, k: int) -> None:
    """What padding holds: values of 0; in q4m, whose values are not moved, minimums of 0 too."""
    size = {"f32": 4, "f16": 2}.get(quant, 1)
    if quant in FLOAT:
        record[(k * 16 + row) * size :][:size] = 0
    elif quant == "q8":
        record[k // 4 * 64 + row * 4 + k % 4] = 0
    elif quant in ("q3", "q2"):
        at, bit = k // 16 * 64 + row * 4 + k % 4, k % 16 // 4 * 2
        record[at] = int(record[at]) & ~(3 << bit) | (2 << bit if quant == "q2" else 0)
        if quant == "q3":
            record[128 + row * 4 + k % 4] |= 1 << k // 4
    else:
        zero = 0 if quant == "q4m" else 0x88
        at, high = k // 8 * 64 + row * 4 + k % 4, k % 8 >= 4
        record[at] = (record[at] & 0x0F) | (zero & 0xF0) if high else (record[at] & 0xF0) | (zero & 0x0F)
        if quant == "q4m":
            record[288 + row * 2 :][:2] = 0


def _inputs_row(quant: str, arguments: list[Any], t: int) -> inputs.F64:
    groups = arguments[2]
    if quant in FLOAT:
        x, x_at, stride = arguments[6:9]
        return x[x_at + t * stride :][: groups * 32].astype(np.float64)
    xq, xs, x_at = arguments[6], arguments[7], arguments[9]
    first = x_at + t * groups
    return xq[first * 32 :][: groups * 32] * np.repeat(xs[first : first + groups].astype(np.float64), 32)
