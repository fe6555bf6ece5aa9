"""Softmax over scores, with stale numbers around them."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import softmax
from edgert.kernels.reference import softmax as softmax_twin
from edgert.kernels.reference.softmax import LOWEST
from tests import kernel_inputs as inputs

STALE = np.float32(3e38)
"""What lies in unused places of a scratch array: anything finite, so the worst of that."""


@st.composite
def softmax_cases(draw: st.DrawFn) -> list[Any]:
    """Scores first..last-1, with stale numbers around them."""
    first = draw(st.integers(0, 70))
    last = first + draw(st.integers(1, 70))
    seed, at = draw(inputs.seeds), draw(st.integers(0, 5))
    s = np.full(at + 150 + 16, STALE)
    flavour, large = draw(inputs.flavours), draw(st.sampled_from([30.0, 1e6, 1e30]))
    s[at + first : at + last] = inputs.floats(seed, flavour, last - first, large=large)
    sink = np.float32(draw(st.just(LOWEST) | st.sampled_from([-5.0, 0.5, large])))
    return [s, at, first, last, sink]


@pytest.mark.compiled
@inputs.some
@given(softmax_cases())
def test_compiled_softmax_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(softmax.softmax, softmax_twin.softmax, *case)


@inputs.some
@given(softmax_cases())
def test_softmax_is_close_to_exact(case: list[Any]) -> None:
    """exp to 3e-7 and its argument to one rounding; what is below e**-87 may be e**-87."""
    s, at, first, last, sink = case
    before = s.copy()
    total = softmax.softmax(*case)
    scores = before[at + first : at + last].astype(np.float64)
    top = max(scores.max(), float(sink))
    differences = scores - top
    expected = np.exp(differences)
    slack = expected * (3e-7 + np.minimum(-differences, 90) * 2.0**-23) + 2e-38
    assert (np.abs(s[at + first : at + last] - expected) <= slack).all()
    assert math.isclose(total, math.fsum(expected) + math.exp(float(sink) - top), rel_tol=2e-5)
    begin, end = first // 16 * 16, -(-last // 16) * 16
    assert not s[at + begin : at + first].any()
    assert not s[at + last : at + end].any()
    before[at + begin : at + end] = s[at + begin : at + end]
    inputs.same(s, before)
