"""Activations, alone and as gates, and soft caps."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.config import ACTIVATIONS
from edgert.kernels import activation, neurons
from edgert.kernels.reference import activation as activation_twin
from tests import kernel_inputs as inputs

offsets = st.integers(0, 9)

# Below where x**2 (relu2) and x**3 (gelu) times u overflow.
LARGEST_GATE = {"silu": 1e18, "relu": 1e18, "relu2": 1e12, "gelu_tanh": 1e11, "gelu": 1e18}


def gate_case(name: str, seed: int, flavour: str, vectors: int, g_at: int, u_at: int) -> list[Any]:
    g = inputs.floats((seed, "g"), flavour, g_at + vectors * 16 + 5, large=LARGEST_GATE[name])
    u = inputs.floats((seed, "u"), flavour, u_at + vectors * 16 + 5, large=1e12)
    g[g_at : g_at + 16 : 3] *= np.float32(10)  # where exp and tanh bend
    return [ACTIVATIONS.index(name), g, g_at, u, u_at, vectors * 16]


gate_cases = st.tuples(inputs.seeds, inputs.flavours, st.integers(1, 5), offsets, offsets)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


EXACT: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "gelu_tanh": gelu_tanh,
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
}


@pytest.mark.compiled
@pytest.mark.parametrize("name", ACTIVATIONS)
@inputs.some
@given(case=gate_cases)
def test_compiled_gates_equal_their_twins(name: str, case: Any) -> None:
    inputs.agree(activation.gate, activation_twin.gate, *gate_case(name, *case))


@pytest.mark.parametrize("name", ACTIVATIONS)
@inputs.some
@given(case=gate_cases)
def test_gates_are_close_to_exact(name: str, case: Any) -> None:
    """A relative 2e-6; for gelu 4e-7 of x * u, because 1 - 1/(e + 1) cancels for negative x, and the tail of
    the normal distribution is known within 1e-7 of 1.

    And the smallest number times u, where act(x) is subnormal.
    """
    arguments = gate_case(name, *case)
    _, g, g_at, u, u_at, count = arguments
    before = g.copy()
    activation.gate(*arguments)
    for i in range(count):
        x, other = float(before[g_at + i]), float(u[u_at + i])
        expected = EXACT[name](x) * other
        slack = 4e-7 * abs(x * other) if name.startswith("gelu") else 2e-6 * abs(expected)
        # exp is clamped at 88: silu of less is 0 to all purposes, but not exactly.
        tail = abs(x * other) * 1e-38 if name == "silu" else 0.0
        assert abs(float(g[g_at + i]) - expected) <= slack + tail + abs(other) * 2.0**-149 + 1e-38
    before[g_at : g_at + count] = g[g_at : g_at + count]
    inputs.same(g, before)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_of_zero_is_zero(name: str) -> None:
    """What keeps the padding of a row zero."""
    g, u = np.zeros(16, np.float32), np.full(16, -3, np.float32)
    activation.gate(ACTIVATIONS.index(name), g, 0, u, 0, 16)
    assert not g.any()


@pytest.mark.parametrize("name", ACTIVATIONS)
@inputs.few
@given(case=gate_cases)
def test_an_activation_alone_is_a_gate_of_ones(name: str, case: Any) -> None:
    kind, g, g_at, _, _, count = gate_case(name, *case)
    alone = g.copy()
    neurons.activate(kind, np.float32(0), alone, g_at, count)
    activation.gate(kind, g, g_at, np.ones(count, np.float32), 0, count)
    inputs.same(alone, g)


def cap_case(seed: int, flavour: str, vectors: int, at: int, cap: float) -> list[Any]:
    return [
        inputs.floats(seed, flavour, at + vectors * 16 + 3, large=1e30),
        at,
        vectors * 16,
        np.float32(cap),
    ]


cap_cases = st.builds(
    cap_case, inputs.seeds, inputs.flavours, st.integers(1, 5), offsets, st.sampled_from([0.5, 30.0, 50.0])
)


@pytest.mark.compiled
@inputs.some
@given(cap_cases)
def test_compiled_caps_equal_their_twins(case: list[Any]) -> None:
    inputs.agree(activation.soft_cap, activation_twin.soft_cap, *case)


@inputs.some
@given(cap_cases)
def test_caps_are_close_to_exact(case: list[Any]) -> None:
    """Within 4e-7 of the cap: 1 - 2 / (e + 1) cancels around zero."""
    x, at, count, cap = case
    before = x.copy()
    activation.soft_cap(*case)
    expected = float(cap) * np.tanh(before[at : at + count].astype(np.float64) / float(cap))
    np.testing.assert_allclose(x[at : at + count], expected, rtol=0, atol=4e-7 * float(cap))
    before[at : at + count] = x[at : at + count]
    inputs.same(x, before)


def clamped_case(
    seed: int, flavour: str, vectors: int, g_at: int, u_at: int, limit: float, alpha: float = 1.702
) -> list[Any]:
    g = inputs.floats((seed, "g"), flavour, g_at + vectors * 16 + 5, large=100)
    u = inputs.floats((seed, "u"), flavour, u_at + vectors * 16 + 5, large=30)
    return [g, g_at, u, u_at, vectors * 16, np.float32(alpha), np.float32(limit)]


clamped_cases = st.builds(
    clamped_case,
    inputs.seeds,
    inputs.flavours,
    st.integers(1, 5),
    offsets,
    offsets,
    st.sampled_from([0.5, 7.0]),
)


@pytest.mark.compiled
@inputs.some
@given(clamped_cases)
def test_compiled_clamped_gates_equal_their_twin(case: list[Any]) -> None:
    inputs.agree(activation.clamped_gate, activation_twin.clamped_gate, *case)


@inputs.some
@given(clamped_cases)
def test_clamped_gates_are_close_to_exact(case: list[Any]) -> None:
    """A relative 3e-6 of x sigmoid(x), and of the larger of u and 1, whose sum may cancel; where exp is
    clamped, or the result subnormal, that is all."""
    g, g_at, u, u_at, count, alpha, limit = case
    before = g.copy()
    activation.clamped_gate(*case)
    for i in range(count):
        x, other = min(float(before[g_at + i]), float(limit)), float(u[u_at + i])
        other = min(max(other, -float(limit)), float(limit))
        swish = x * sigmoid(float(alpha) * x)
        slack = 3e-6 * abs(swish) * max(abs(other), 1) + abs(x) * 1e-37 + 1e-37
        assert abs(float(g[g_at + i]) - swish * (other + 1)) <= slack
    before[g_at : g_at + count] = g[g_at : g_at + count]
    inputs.same(g, before)


def test_a_clamped_gate_of_zero_is_zero() -> None:
    """What keeps the padding of a row zero."""
    g, u = np.zeros(16, np.float32), np.full(16, -3, np.float32)
    activation.clamped_gate(g, 0, u, 0, 16, np.float32(1.7), np.float32(7))
    assert not g.any()
