"""Kernels over single rows: norm, sums, quantisation, embedding, the k largest."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import embedding, quantize, rmsnorm, row_sums, topk
from edgert.kernels.reference import embedding as embedding_twin
from edgert.kernels.reference import quantize as quantize_twin
from edgert.kernels.reference import rmsnorm as rmsnorm_twin
from edgert.kernels.reference import row_sums as row_sums_twin
from edgert.kernels.reference import topk as topk_twin
from tests import kernel_inputs as inputs

offsets = st.integers(0, 9)

# ---- rmsnorm ---------------------------------------------------------------------------------


def norm_case(seed: int, flavour: str, width: int, at: int, eps: float) -> list[Any]:
    """Arguments of rmsnorm: row and gains padded with zeros to whole vectors, gains at an odd byte."""
    vectors = -(-width // 16) * 16
    x = inputs.floats((seed, "x"), flavour, at + vectors + 3, large=1e17)
    x[at + width : at + vectors] = 0
    gains = inputs.floats((seed, "gain"), "plain", vectors)
    gains[width:] = 0
    w = np.concatenate([np.full(at, 255, np.uint8), gains.view(np.uint8)])
    y = inputs.floats((seed, "y"), "plain", vectors + at + 5)
    return [x, at, width, np.float32(eps), w, at, y, at + 1]


norm_cases = st.builds(
    norm_case,
    inputs.seeds,
    inputs.flavours,
    st.integers(1, 300),
    offsets,
    st.sampled_from([1e-6, 1e-5, 0.02]),
)


@pytest.mark.compiled
@inputs.some
@given(norm_cases)
def test_compiled_norm_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(rmsnorm.rmsnorm, rmsnorm_twin.rmsnorm, *case)


@inputs.some
@given(norm_cases)
def test_norm_is_close_to_exact(case: list[Any]) -> None:
    """A relative 2e-6; below the normal numbers one unit of theirs, times the largest scale 1000."""
    x, at, width, eps, w, gain_at, y, y_at = case
    before = y.copy()
    rmsnorm.rmsnorm(*case)
    row = x[at : at + width].astype(np.float64)
    gains = np.frombuffer(w.tobytes(), "<f4", offset=gain_at)[:width].astype(np.float64)
    scale = 1 / math.sqrt(math.fsum(v * v for v in row) / width + float(eps))
    np.testing.assert_allclose(y[y_at : y_at + width], gains * row * scale, rtol=2e-6, atol=3e-45)
    vectors = -(-width // 16) * 16
    assert not y[y_at + width : y_at + vectors].any()
    before[y_at : y_at + vectors] = y[y_at : y_at + vectors]
    inputs.same(y, before)


def test_norm_in_place() -> None:
    """As the norm of a head uses it: x and y are the same span of one array."""
    x, at, width, eps, w, gain_at, y, y_at = norm_case(3, "plain", 24, 4, 1e-5)
    rmsnorm.rmsnorm(x, at, width, eps, w, gain_at, y, y_at)
    rmsnorm.rmsnorm(x, at, width, eps, w, gain_at, x, at)
    inputs.same(x[at : at + 32], y[y_at : y_at + 32])


# ---- quantize --------------------------------------------------------------------------------


def quantize_case(seed: int, flavour: str, groups: int, x_at: int, at: int) -> list[Any]:
    x = inputs.floats((seed, "x"), flavour, x_at + groups * 32 + 5, large=3e38)
    room = at + groups + 2
    xq = inputs.raw((seed, "xq"), room * 32).view(np.int8)
    xs = inputs.floats((seed, "xs"), "plain", room)
    xn = inputs.whole((seed, "xn"), -99, 99, room).astype(np.int32)
    return [x, x_at, groups, xq, xs, xn, at]


quantize_cases = st.builds(quantize_case, inputs.seeds, inputs.flavours, st.integers(1, 6), offsets, offsets)


@pytest.mark.compiled
@inputs.some
@given(quantize_cases)
def test_compiled_quantisation_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(quantize.quantize, quantize_twin.quantize, *case)


@inputs.some
@given(quantize_cases)
def test_quantised_values_are_within_half_a_step(case: list[Any]) -> None:
    """Half a step of the scale, and 1e-6 of the largest for the rounding of 127 / largest."""
    x, x_at, groups, xq, xs, xn, at = case
    before = [a.copy() for a in (xq, xs, xn)]
    quantize.quantize(*case)
    for g in range(groups):
        row = x[x_at + g * 32 :][:32].astype(np.float64)
        whole = xq[(at + g) * 32 :][:32].astype(int)
        largest = np.abs(row).max()
        scale = float(xs[at + g])
        assert scale == float(np.float32(largest / 127))
        assert xn[at + g] == whole.sum()
        if largest <= 1e-30:
            assert not whole.any()
            continue
        assert np.abs(whole).max() == 127
        assert (np.abs(row - whole * scale) <= scale * 0.5 + largest * 1e-6).all()
        assert not whole[row == 0].any()
    for now, then, unit in zip((xq, xs, xn), before, (32, 1, 1), strict=True):
        then[at * unit : (at + groups) * unit] = now[at * unit : (at + groups) * unit]
        np.testing.assert_array_equal(now, then)


def test_quantised_ties_go_to_even() -> None:
    x = np.zeros(32, np.float32)
    x[:8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127]
    xq, xs, xn = np.zeros(32, np.int8), np.zeros(1, np.float32), np.zeros(1, np.int32)
    quantize.quantize(x, 0, 1, xq, xs, xn, 0)
    assert xq[:8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]
    assert xs[0] == 1
    assert xn[0] == 0


# ---- embed -----------------------------------------------------------------------------------


def embed_case(quant: str, seed: int, flavour: str, groups: int, blocks: int, token: int) -> list[Any]:
    w_at, y_at = 6, 3
    weights = inputs.weight_bytes(quant, seed, blocks, groups, flavour)
    w = np.concatenate([np.full(w_at, 255, np.uint8), weights])
    y = inputs.floats((seed, "y"), "plain", groups * 32 + 9)
    kind = inputs.QUANTS.index(quant)
    return [kind, w, w_at, groups, token % (blocks * 16), y, y_at]


embed_cases = st.tuples(
    inputs.seeds, inputs.flavours, st.integers(1, 4), st.integers(1, 3), st.integers(0, 47)
)


@pytest.mark.compiled
@pytest.mark.parametrize("quant", inputs.QUANTS)
@inputs.some
@given(case=embed_cases)
def test_compiled_embedding_equals_its_twin(quant: str, case: Any) -> None:
    inputs.agree(embedding.embed, embedding_twin.embed, *embed_case(quant, *case))


@pytest.mark.parametrize("quant", inputs.QUANTS)
@inputs.few
@given(case=embed_cases)
def test_an_embedding_is_the_stored_row(quant: str, case: Any) -> None:
    """Exactly, as 11 bits of scale times 8 of value fit a float32; q4m rounds its sum once."""
    arguments = embed_case(quant, *case)
    _, w, w_at, groups, token, y, y_at = arguments
    before = y.copy()
    embedding.embed(*arguments)
    row = [inputs.stored_value(quant, w, w_at, groups, token, k) for k in range(groups * 32)]
    np.testing.assert_array_equal(y[y_at : y_at + groups * 32], np.float32(row))
    inputs.same(y[:y_at], before[:y_at])
    inputs.same(y[y_at + groups * 32 :], before[y_at + groups * 32 :])


# ---- row_sums --------------------------------------------------------------------------------


def center_case(seed: int, flavour: str, width: int, at: int) -> list[Any]:
    vectors = -(-width // 16) * 16
    x = inputs.floats((seed, "x"), flavour, at + vectors + 3, large=1e17)
    x[at + width : at + vectors] = 0
    return [x, at, width, inputs.floats((seed, "y"), "plain", vectors + at + 5), at + 1]


center_cases = st.builds(center_case, inputs.seeds, inputs.flavours, st.integers(1, 300), offsets)


@pytest.mark.compiled
@inputs.some
@given(center_cases)
def test_compiled_centring_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(row_sums.center, row_sums_twin.center, *case)


@inputs.some
@given(center_cases)
def test_centring_takes_the_mean_away(case: list[Any]) -> None:
    """Within 1e-6 of the largest value; padding becomes zero and the rest stays as it was."""
    x, at, width, y, y_at = case
    before = y.copy()
    row_sums.center(*case)
    row = x[at : at + width].astype(np.float64)
    slack = 1e-6 * np.abs(row).max() + 1e-44
    np.testing.assert_allclose(y[y_at : y_at + width], row - math.fsum(row) / width, rtol=0, atol=slack)
    end = y_at + -(-width // 16) * 16
    assert not y[y_at + width : end].any()
    before[y_at:end] = y[y_at:end]
    inputs.same(y, before)


@pytest.mark.compiled
@pytest.mark.parametrize("of_bytes", [False, True])
@inputs.some
@given(case=center_cases)
def test_compiled_sums_equal_their_twins(of_bytes: bool, case: list[Any]) -> None:
    x, at, width, y, y_at = case
    inputs.agree(row_sums.add, row_sums_twin.add, *_addend(of_bytes, x, at), width, y, y_at)


@pytest.mark.parametrize("of_bytes", [False, True])
@inputs.few
@given(case=center_cases)
def test_a_row_is_added_to_another(of_bytes: bool, case: list[Any]) -> None:
    x, at, width, y, y_at = case
    before = y.copy()
    row_sums.add(*_addend(of_bytes, x, at), width, y, y_at)
    end = -(-width // 16) * 16
    exact = x[at : at + end].astype(np.float64) + before[y_at : y_at + end]
    before[y_at : y_at + end] = exact.astype(np.float32)
    np.testing.assert_array_equal(y, before)


def _addend(of_bytes: bool, x: Any, at: int) -> tuple[Any, int]:
    return (x.view(np.uint8), at * 4) if of_bytes else (x, at)


# ---- topk ------------------------------------------------------------------------------------


@st.composite
def topk_cases(draw: st.DrawFn) -> list[Any]:
    n = draw(st.integers(1, 200))
    seed, at = draw(inputs.seeds), draw(offsets)
    if draw(st.booleans()):  # few different values: ties
        x = inputs.whole(seed, -3, 3, n + at + 2).astype(np.float32)
    else:
        x = inputs.floats(seed, draw(inputs.flavours), n + at + 2)
    return [x, at, n, draw(st.integers(1, min(n, 40))), np.full(44, -1, np.int64)]


@pytest.mark.compiled
@inputs.some
@given(topk_cases())
def test_compiled_topk_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(topk.topk, topk_twin.topk, *case)


@inputs.some
@given(topk_cases())
def test_topk_is_the_head_of_a_sort(case: list[Any]) -> None:
    x, at, n, k, index = case
    topk.topk(*case)
    expected = sorted(range(n), key=lambda i: (-float(x[at + i]), i))[:k]
    assert index.tolist() == expected + [-1] * (44 - k)
