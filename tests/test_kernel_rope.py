"""Rotary embedding: the table's sines and cosines, and the rotation of a head."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import rope
from edgert.kernels.reference import rope as twins
from tests import kernel_inputs as inputs

POSITIONS = 131072


def table_case(seed: int, position: int, half: int, magnitude: float) -> list[Any]:
    """Arguments of rope_table, with frequencies in (0, 1] at an odd byte."""
    frequencies = np.abs(inputs.uniform((seed, "f"), half)) + np.float32(2.0**-30)
    frequencies[0] = 1
    w = np.concatenate([np.full(3, 255, np.uint8), frequencies.view(np.uint8)])
    y = inputs.uniform((seed, "y"), 2 * half + 7)
    return [position, w, 3, half, np.float32(magnitude), y, 2]


tables = st.builds(
    table_case, inputs.seeds, st.integers(0, POSITIONS), st.integers(1, 70), st.sampled_from([1.0, 1.1386])
)


@pytest.mark.compiled
@inputs.some
@given(tables)
def test_compiled_tables_equal_their_twins(case: list[Any]) -> None:
    inputs.agree(rope.rope_table, twins.rope_table, *case)


@inputs.some
@given(tables)
def test_tables_hold_cosines_and_sines(case: list[Any]) -> None:
    """Of the angle rounded to float32: within half a unit, times the magnitude rounded once more."""
    position, w, at, half, magnitude, y, y_at = case
    before = y.copy()
    rope.rope_table(*case)
    for i in range(half):
        frequency = np.frombuffer(w.tobytes(), "<f4", 1, at + 4 * i)[0]
        angle = float(np.float32(position) * frequency)
        for found, exact in ((y[y_at + i], math.cos(angle)), (y[y_at + half + i], math.sin(angle))):
            assert abs(float(found) - exact * float(magnitude)) <= 2.0**-23 * abs(exact * magnitude) + 1e-12
    before[y_at : y_at + 2 * half] = y[y_at : y_at + 2 * half]
    inputs.same(y, before)


def test_sines_are_those_of_float64_rounded() -> None:
    """For every whole angle up to 131072: equal in at least 99.99 %, never off by two units."""
    count = POSITIONS + 1
    w = np.arange(count, dtype=np.float32).view(np.uint8)  # position 1, frequency n: the angle is n
    y = np.zeros(2 * count, np.float32)
    rope.rope_table(1, w, 0, count, np.float32(1), y, 0)
    exact = np.array([math.cos(n) for n in range(count)] + [math.sin(n) for n in range(count)], np.float32)
    assert np.mean(y == exact) >= 0.9999
    np.testing.assert_array_max_ulp(y, exact, maxulp=1)


@pytest.mark.compiled
def test_compiled_sines_equal_their_twin_everywhere() -> None:
    count = POSITIONS + 1
    w = np.arange(count, dtype=np.float32).view(np.uint8)
    inputs.agree(
        rope.rope_table, twins.rope_table, 1, w, 0, count, np.float32(1), np.zeros(2 * count, np.float32), 0
    )


def test_position_times_frequency_is_rounded_to_float32() -> None:
    frequency = np.float32(0.1)
    for position in (1, 7, 99_999, POSITIONS):
        y = np.zeros(2, np.float32)
        rope.rope_table(position, np.atleast_1d(frequency).view(np.uint8), 0, 1, np.float32(1), y, 0)
        angle = float(np.float32(position) * frequency)
        np.testing.assert_array_max_ulp(y, np.float32([math.cos(angle), math.sin(angle)]), maxulp=1)


def rotate_case(seed: int, flavour: str, half: int, x_at: int, at: int) -> list[Any]:
    x = inputs.floats((seed, "x"), flavour, x_at + 2 * half + 3)
    angles = inputs.uniform((seed, "a"), half).astype(np.float64) * 4
    table = np.concatenate([np.zeros(at), np.cos(angles), np.sin(angles)]).astype(np.float32)
    return [x, x_at, half, table, at]


rotations = st.builds(
    rotate_case, inputs.seeds, inputs.flavours, st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)
)


@pytest.mark.compiled
@inputs.some
@given(rotations)
def test_compiled_rotation_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(rope.rotate, twins.rotate, *case)


@inputs.some
@given(rotations)
def test_rotation_turns_pairs(case: list[Any]) -> None:
    """Two products and a sum: three roundings of the pair's magnitude."""
    x, at, half, table, table_at = case
    before = x.astype(np.float64)
    rope.rotate(*case)
    for i in range(half):
        turn = complex(table[table_at + i], table[table_at + half + i])
        pair = complex(before[at + i], before[at + half + i])
        expected = pair * turn
        slack = 3 * 2.0**-24 * (abs(pair.real) + abs(pair.imag)) + 1e-44
        assert abs(x[at + i] - expected.real) <= slack
        assert abs(x[at + half + i] - expected.imag) <= slack
    before[at : at + 2 * half] = x[at : at + 2 * half]
    inputs.same(x, before.astype(np.float32))
