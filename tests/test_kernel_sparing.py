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
