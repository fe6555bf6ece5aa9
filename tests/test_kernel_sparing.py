"""The approximations that spare reads: who gives way, who is left out, and what the weights become."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import sparing
from edgert.kernels.reference import sparing as sparing_twin
from tests import kernel_inputs as inputs

UNIT = sparing.UNIT


def case(odds: list[float], here: list[int], chosen: list[int], near: float, least: float) -> list[Any]:
    """Arguments of spare: one row of experts with these probabilities, of which those in `here` are there."""
    x = np.array(odds, np.float32)
    table = np.full(2 * len(odds), -1, np.int64)
    table[[2 * e for e in here]] = 4096
    weights = x[chosen] / np.float32(x.sum())
    picks = np.array(chosen, np.int64)
    rest = (table, 0, picks, 0, weights, 0)
    return [x, 0, len(odds), len(chosen), round(near * UNIT), round(least * UNIT), *rest]


@st.composite
def cases(draw: st.DrawFn) -> list[Any]:
    count = draw(st.integers(1, 40))
    active = draw(st.integers(1, min(8, count)))
    odds = [2.0 ** -draw(st.integers(0, 9)) for _ in range(count)]
    chosen = sorted(range(count), key=lambda e: (-odds[e], e))[:active]
    here = draw(st.lists(st.integers(0, count - 1), unique=True))
    return case(
        odds, here, chosen, draw(st.sampled_from([0, 0.3, 0.6])), draw(st.sampled_from([0, 0.1, 0.4]))
    )


@pytest.mark.compiled
@inputs.some
@given(cases())
def test_compiled_sparing_equals_its_twin(arguments: list[Any]) -> None:
    inputs.agree(sparing.spare, sparing_twin.spare, *arguments)


@inputs.some
@given(cases())
def test_only_missing_experts_change_and_the_weights_keep_their_sum(arguments: list[Any]) -> None:
    table, picks, weights = arguments[6], arguments[8], arguments[10]
    before, total = picks.copy(), float(weights.sum())
    swapped, dropped = sparing.spare(*arguments)
    changed = before != picks
    assert (table[2 * before[changed]] < 0).all()
    assert swapped + dropped >= changed.sum()
    assert dropped == (weights == 0).sum()
    assert float(weights.sum()) == pytest.approx(total, rel=1e-5)


def test_a_missing_expert_gives_way_to_one_nearly_as_probable() -> None:
    arguments = case([8, 4, 3.5, 1], here=[0, 2, 3], chosen=[0, 1], near=0.2, least=0)
    assert tuple(sparing.spare(*arguments)) == (1, 0)
    assert arguments[8].tolist() == [0, 2]
    np.testing.assert_allclose(arguments[10], np.array([8, 3.5]) / 11.5 * 12 / 16.5, rtol=1e-6)


def test_one_that_is_far_less_probable_does_not_replace_it() -> None:
    arguments = case([8, 4, 3, 1], here=[0, 2, 3], chosen=[0, 1], near=0.2, least=0)
    assert tuple(sparing.spare(*arguments)) == (0, 0)
    assert arguments[8].tolist() == [0, 1]


def test_a_missing_expert_of_little_weight_is_left_out_and_the_best_never() -> None:
    arguments = case([8, 1, 1, 0.5], here=[1], chosen=[0, 1, 2], near=0, least=0.2)
    assert tuple(sparing.spare(*arguments)) == (0, 1)
    assert arguments[8].tolist() == [0, 1, 0]  # 1 is there; 2 is not; 0 is the best
    np.testing.assert_allclose(arguments[10], np.array([8, 1, 0]) / 9 * 10 / 10.5, rtol=1e-6)


def stand_in_case(odds: list[float], here: list[int], chosen: list[int], below: float) -> list[Any]:
    """Arguments of stand_in: as `case`, with stand-ins for all experts; none of them is there."""
    x, at, count, active, _, _, table, *rest = case(odds, here, chosen, 0, 0)
    both = np.concatenate([table, np.full(2 * count, -1, np.int64)])
    return [x, at, count, active, round(below * UNIT), both, *rest]


@st.composite
def stand_in_cases(draw: st.DrawFn) -> list[Any]:
    count = draw(st.integers(1, 20))
    active = draw(st.integers(1, min(8, count)))
    odds = [2.0 ** -draw(st.integers(0, 9)) for _ in range(count)]
    chosen = sorted(range(count), key=lambda e: (-odds[e], e))[:active]
    here = draw(st.lists(st.integers(0, count - 1), unique=True))
    arguments = stand_in_case(odds, here, chosen, draw(st.sampled_from([0.1, 0.4, 1.0])))
    if draw(st.booleans()):  # the last was left out, in favour of the best
        arguments[7][-1], arguments[9][-1] = arguments[7][0], np.float32(0)
    return arguments


@pytest.mark.compiled
@inputs.some
@given(stand_in_cases())
def test_compiled_standing_in_equals_its_twin(arguments: list[Any]) -> None:
    inputs.agree(sparing.stand_in, sparing_twin.stand_in, *arguments)


def test_a_smaller_copy_stands_in_for_a_missing_expert_of_little_weight() -> None:
    arguments = stand_in_case([8, 4, 2, 1, 1], here=[3], chosen=[0, 1, 2, 3], below=0.3)
    weights = arguments[9].copy()
    assert sparing.stand_in(*arguments) == 2
    assert arguments[7].tolist() == [0, 5 + 1, 5 + 2, 3]  # 0 weighs too much, 3 is there
    np.testing.assert_array_equal(arguments[9], weights)


def test_what_was_left_out_goes_with_the_best() -> None:
    arguments = stand_in_case([8, 4, 1], here=[], chosen=[0, 1, 0], below=0.5)
    arguments[9][2] = 0
    assert sparing.stand_in(*arguments) == 1
    assert arguments[7].tolist() == [0, 3 + 1, 0]
