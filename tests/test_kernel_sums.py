"""The sum behind a log-probability, and the reading of memory."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import exp_sum, stream
from edgert.kernels.reference import exp_sum as exp_sum_twin
from edgert.kernels.reference import stream as stream_twin
from tests import kernel_inputs as inputs

lengths = st.one_of(st.integers(1, 70), st.integers(1000, 1100), st.integers(4000, 4100))


@pytest.mark.compiled
@inputs.some
@given(lengths, inputs.seeds)
def test_compiled_exp_sum_equals_its_twin(length: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(0, 9, length).astype(np.float32)
    assert exp_sum.exp_sum(x, x.max()) == exp_sum_twin.exp_sum(x, x.max())


@inputs.some
@given(lengths, inputs.seeds)
def test_exp_sum_is_close_to_exact(length: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(0, 9, length).astype(np.float32)
    expected = math.fsum(math.exp(float(v) - float(x.max())) for v in x)
    assert math.isclose(exp_sum.exp_sum(x, x.max()), expected, rel_tol=3e-6)


@pytest.mark.compiled
@inputs.few
@given(st.integers(0, 9), st.integers(0, 5), inputs.seeds)
def test_compiled_reading_equals_its_twin(steps: int, start: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, 6000, dtype=np.uint8)
    start, count = 4 * start, steps * stream.STEP
    assert stream.read(data, start, count) == stream_twin.read(data, start, count)


def test_reading_sees_every_byte() -> None:
    data = np.zeros(2 * stream.STEP, np.uint8)
    for place in range(data.size):
        data[place] = 1
        assert stream.read(data, 0, data.size) != 0
        data[place] = 0
    assert stream.read(data, 0, data.size) == 0
