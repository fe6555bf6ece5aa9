"""Rounding weights to whole numbers and scales: the kernel, its twin, and both against plain float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.converters.quantize import SEARCHES, measured, quantize, relative_error, search_into
from edgert.kernels import rounding
from edgert.kernels.packing import byte_scales
from edgert.kernels.reference import rounding as twins
from tests import kernel_inputs as inputs

Numbers = NDArray[np.float64]
quants = st.sampled_from(list(SEARCHES))


def rows_case(quant: str, seed: int, flavour: str, rows: int, columns: int) -> list[Any]:
    groups = -(-columns // 32)
    weights = inputs.floats(seed, flavour, rows, columns, large=3e4)
    importance = np.abs(inputs.uniform((seed, "importance"), groups * 32)) + np.float32(2**-10)
    if quant == "q4m":
        importance /= np.repeat(importance.reshape(groups, 32).sum(axis=1), 32)
    found = np.zeros((rows, columns), np.int8), *np.zeros((2, rows, groups), np.float32)
    return [*SEARCHES[quant], weights, importance, *found, np.zeros((-(-rows // 16), 2))]


def groups_case(quant: str, seed: int, flavour: str, k: int, lanes: int) -> list[Any]:
    weight = np.abs(inputs.uniform((seed, "weight"), k)) + np.float32(2**-10)
    if quant == "q4m":
        weight /= weight.sum()
    x = inputs.floats(seed, flavour, k, 16 * lanes, large=3e4)
    return [*SEARCHES[quant], x, weight, *np.zeros((2, 16 * lanes), np.float32)]


def compensated_case(quant: str, seed: int, flavour: str, k: int, lanes: int) -> list[Any]:
    how, low, high, candidates, x, weight, scales, minimums = groups_case(quant, seed, flavour, k, lanes)
    twins.search_groups(how, low, high, candidates, x, weight, scales, minimums)
    answer = np.triu(inputs.uniform((seed, "answer"), k, k)) * np.float32(0.1) + np.eye(k, dtype=np.float32)
    return [low, high, x, answer, scales, minimums, np.zeros(x.shape, np.int8), np.zeros_like(x)]


@pytest.mark.compiled
@inputs.some
@given(quants, inputs.seeds, inputs.flavours, st.integers(1, 40), st.integers(1, 100))
def test_compiled_rounding_equals_its_twin(
    quant: str, seed: int, flavour: str, rows: int, columns: int
) -> None:
    inputs.agree(rounding.round_rows, twins.round_rows, *rows_case(quant, seed, flavour, rows, columns))


@pytest.mark.compiled
@inputs.some
@given(quants, inputs.seeds, inputs.flavours, st.integers(1, 32), st.integers(1, 3))
def test_compiled_search_equals_its_twin(quant: str, seed: int, flavour: str, k: int, lanes: int) -> None:
    inputs.agree(rounding.search_groups, twins.search_groups, *groups_case(quant, seed, flavour, k, lanes))


@pytest.mark.compiled
@inputs.some
@given(quants, inputs.seeds, inputs.flavours, st.integers(1, 32), st.integers(1, 3))
def test_a_compiled_group_equals_its_twin(quant: str, seed: int, flavour: str, k: int, lanes: int) -> None:
    inputs.agree(rounding.round_group, twins.round_group, *compensated_case(quant, seed, flavour, k, lanes))


# ---- by hand ---------------------------------------------------------------------------------


def search(x: NDArray[np.float32], quant: str, weight: NDArray[np.float32]) -> Any:
    lanes = np.zeros((len(x), -(-x.shape[1] // 16) * 16), np.float32)
    lanes[:, : x.shape[1]] = x
    scales, minimums = np.empty((2, lanes.shape[1]), np.float32)
    search_into(lanes, quant, weight, scales, minimums)
    return scales[: x.shape[1]], minimums[: x.shape[1]]


def rounded(x: Numbers, scale: float, minimum: float, low: int, high: int) -> Numbers:
    return np.clip(np.rint((x - minimum) / scale), low, high) * scale + minimum if scale else 0 * x + minimum


def lost(x: Numbers, weight: Numbers, scale: float, minimum: float, low: int, high: int) -> float:
    return float((weight * (x - rounded(x, scale, minimum, low, high)) ** 2).sum())


def best_line(x: Numbers, weight: Numbers, q: Numbers, offset: bool) -> tuple[float, float]:
    """Least squares for fixed whole numbers."""
    share = weight / weight.sum()
    x_mean, q_mean = ((share * x).sum(), (share * q).sum()) if offset else (0.0, 0.0)
    length = (share * (q - q_mean) ** 2).sum()
    scale = (share * (q - q_mean) * (x - x_mean)).sum() / length if length > 0 else 0.0
    return scale, x_mean - scale * q_mean


def half(value: float) -> float:
    return float(np.float16(np.clip(value, -65504, 65504)))


def by_hand(quant: str, x: Numbers, weight: Numbers) -> float:
    """The error that the search of one group promises, in float64."""
    _, low, high, candidates = (v if isinstance(v, np.ndarray) else int(v) for v in SEARCHES[quant])
    extreme = x[np.abs(x).argmax()]
    if quant == "q8":
        return lost(x, weight, half(abs(extreme) / 127), 0, low, high)
    lines, left = [(0.0, 0.0)], [(weight * x**2).sum()]
    if quant == "q4m":
        lines = [(0.0, half((weight * x).sum() / weight.sum()))]
        for span, below in candidates.reshape(-1, 2).astype(np.float64):
            scale, minimum = np.ptp(x) * span, x.min() + np.ptp(x) * below
            for _ in range(2):
                scale, minimum = best_line(x, weight, np.clip(np.rint((x - minimum) / scale), 0, 15), True)
            lines.append((half(scale), half(minimum)))
    else:
        for divisor in candidates:
            # In float32, as defined: for half of them the extreme falls right between two whole numbers.
            q = np.clip(np.rint(x.astype(np.float32) * (1 / np.float32(extreme) * divisor)), low, high)
            scale = best_line(x, weight, q, False)[0]
            left.append((weight * (x - q * scale) ** 2).sum())
            lines.append((scale if quant == "q4" else float(byte_scales(np.array([scale]))[0]), 0.0))
    if quant == "q4":
        q = np.clip(np.rint(x / lines[int(np.argmin(left))][0]), low, high)
        lines = [(half(best_line(x, weight, q, False)[0]), 0.0), (half(extreme / -8), 0.0)]
    return min(lost(x, weight, scale, minimum, low, high) for scale, minimum in lines)


@pytest.mark.parametrize("quant", SEARCHES)
@pytest.mark.parametrize("flavour", ["plain", "outlier", "sparse"])
def test_the_error_is_that_of_the_search_in_float64(quant: str, flavour: str) -> None:
    """Within 1e-4, and in nearly all groups: of two candidates as good in float32 either may be taken."""
    x = inputs.floats(quant, flavour, 32, 40, large=4)
    weight = np.abs(inputs.uniform("weights", 32)) + np.float32(0.1)
    scales, minimums = search(x, quant, weight)
    low, high = (int(limit) for limit in SEARCHES[quant][1:3])
    close = 0
    for g, column in enumerate(x.T.astype(np.float64)):
        minimum = float(minimums[g])
        ours = lost(column, weight.astype(np.float64), float(scales[g]), minimum, low, high)
        theirs = by_hand(quant, column, weight.astype(np.float64)) if column.any() else 0.0
        assert ours <= theirs * 1.05 + 1e-12
        close += abs(ours - theirs) <= 1e-4 * theirs + 1e-12
    assert close >= 36


@pytest.mark.parametrize("quant", SEARCHES)
def test_rows_are_rounded_with_what_the_search_finds_and_their_loss_is_counted(quant: str) -> None:
    weights = inputs.uniform("rows", 37, 96)
    case = rows_case(quant, 0, "plain", 37, 96)
    case[4], case[5] = weights, case[5] * 0 + np.float32(1 if quant != "q4m" else 1 / 32)
    rounding.round_rows(*case)
    values, scales, minimums, sums = case[6:]
    for n, g in ((0, 0), (15, 2), (36, 1)):
        group = weights[n, g * 32 : g * 32 + 32].astype(np.float64)
        scale, minimum = (found[n : n + 1] for found in (scales[:, g], minimums[:, g]))
        ours = search(group.astype(np.float32)[:, None], quant, np.ones(32, np.float32))
        assert (scale, minimum) == ours
        restored = values[n, g * 32 : g * 32 + 32] * float(scale[0]) + float(minimum[0])
        low, high = (int(limit) for limit in SEARCHES[quant][1:3])
        np.testing.assert_allclose(restored, rounded(group, float(scale[0]), float(minimum[0]), low, high))
    restored = values * np.repeat(scales, 32, axis=1).astype(np.float64) + np.repeat(minimums, 32, axis=1)
    for block, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 37))):
        expected = np.square(weights[part] - restored[part]).sum(), np.square(weights[part]).sum()
        np.testing.assert_allclose(sums[block], expected, rtol=1e-5)


@pytest.mark.parametrize("quant", SEARCHES)
def test_a_group_makes_up_for_its_errors_as_by_hand(quant: str) -> None:
    low, high, x, answer, scales, minimums, values, made = compensated_case(quant, 5, "plain", 20, 2)
    left = x.astype(np.float64)
    rounding.round_group(low, high, x, answer, scales, minimums, values, made)
    for n in range(32):
        scale, minimum = float(scales[n]), float(minimums[n])
        for j in range(20):
            assert abs(values[j, n] - np.clip((left[j, n] - minimum) / scale, low, high)) <= 0.5 + 1e-3
            error = (left[j, n] - (values[j, n] * scale + minimum)) / float(answer[j, j])
            assert error == pytest.approx(made[j, n], abs=1e-5)
            for i in range(j + 1, 20):
                left[i, n] -= float(answer[j, i]) * error


@pytest.mark.compiled
def test_arrays_of_every_kind_take_the_same_machine_code() -> None:
    weights = inputs.uniform("kinds", 48, 64)
    expected = quantize(weights, "q4").values
    kinds = len(rounding.round_rows.signatures)
    fixed = weights.copy()
    fixed.flags.writeable = False
    for kind in (fixed, np.asfortranarray(weights), weights.astype(np.float64), weights[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(quantize(kind, "q4").values, expected)
    assert len(rounding.round_rows.signatures) == kinds


@pytest.mark.parametrize("quant", SEARCHES)
def test_what_is_lost_is_that_of_the_floats(quant: str) -> None:
    weights = inputs.uniform("lost", 50, 64)
    codes, found = measured(weights, quant)
    assert found.relative == pytest.approx(
        relative_error(weights, quantize(weights, quant).floats()), rel=1e-5
    )
    np.testing.assert_array_equal(codes.values, quantize(weights, quant).values)
