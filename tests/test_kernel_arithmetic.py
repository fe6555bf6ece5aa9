"""The arithmetic under the twins, against exact rational numbers; and compiled code against it."""

import math
from fractions import Fraction
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgert.kernels import elementwise, jit, simd
from edgert.kernels.reference import arithmetic
from tests import kernel_inputs as inputs


def nearest_float32(value: Fraction) -> float:
    """A rational number rounded to float32, to nearest even, by hand; subnormals included."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    assert Fraction(2) ** exponent <= size < Fraction(2) ** (exponent + 1)
    unit = Fraction(2) ** max(exponent - 23, -149)
    count = size / unit
    below = count.numerator // count.denominator
    rest = count - below
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1):
        below += 1
    return math.copysign(float(below * unit), value)


def floats32(limit: float = 2.0**60) -> st.SearchStrategy[float]:
    return st.floats(-limit, limit, width=32, allow_nan=False)


@st.composite
def any_terms(draw: st.DrawFn) -> tuple[float, float, float]:
    return draw(floats32()), draw(floats32()), draw(floats32(2.0**120))


@st.composite
def cancelling_terms(draw: st.DrawFn) -> tuple[float, float, float]:
    """c is -a * b rounded, or a neighbour of that."""
    a, b = draw(floats32(2.0**50)), draw(floats32(2.0**50))
    c = np.float32(-nearest_float32(Fraction(a) * Fraction(b)))
    for _ in range(draw(st.integers(0, 2))):
        c = np.nextafter(c, np.float32(draw(st.sampled_from([-np.inf, np.inf]))))
    return a, b, float(c)


@st.composite
def halfway_terms(draw: st.DrawFn) -> tuple[float, float, float]:
    """a * b lies at, or a hair from, half a unit in the last place of c."""
    exponent = draw(st.integers(-100, 100))
    mantissa = draw(st.integers(2**23, 2**24 - 1))
    c = math.ldexp(mantissa, exponent - 23) * draw(st.sampled_from([-1, 1]))
    k = draw(st.integers(5, 23))
    a = 1 + 2.0**-k
    # Products 1 - 2**-2k, 1 + 2**-3k (as far as a float32 holds the factor), 1 and 3: the hair is up
    # to 70 places below the leading bit of c, where a float64 no longer sees it.
    factors = [1 - 2.0**-k, float(np.float32(1 - 2.0**-k + 2.0 ** (-2 * k))), 1.0, 3.0]
    b = math.ldexp(draw(st.sampled_from(factors)), exponent - 24)
    return a * draw(st.sampled_from([-1, 1])), b, c


@st.composite
def subnormal_terms(draw: st.DrawFn) -> tuple[float, float, float]:
    """a * b and c around the smallest numbers there are."""
    a = math.ldexp(draw(st.integers(-(2**24) + 1, 2**24 - 1)), draw(st.integers(-100, -90)))
    b = math.ldexp(draw(st.integers(1, 2**12)), draw(st.integers(-75, -60)))
    c = math.ldexp(draw(st.integers(-(2**24) + 1, 2**24 - 1)), -149)
    return a, b, c


terms = st.one_of(any_terms(), cancelling_terms(), halfway_terms(), subnormal_terms())


def check_fused(found: np.float32, a: float, b: float, c: float) -> None:
    assert all(float(np.float32(v)) == v for v in (a, b, c)), "a test value is no float32"
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    expected = nearest_float32(exact)
    assert float(found) == expected
    if exact:
        assert math.copysign(1, found) == math.copysign(1, exact)


@inputs.many
@given(terms)
@example((1.0, 2.0**-24, 1.0))  # a tie, to even: 1
@example((1.0, 2.0**-24, 1.0 + 2.0**-23))  # a tie, to even: up
@example((1.0 + 2.0**-11, 2.0**-24 * (1 - 2.0**-11 + 2.0**-22), 1.0))  # a hair above a tie: up
@example((1.0 + 2.0**-20, 2.0**-24 * (1 - 2.0**-20), 1.0 + 2.0**-23))  # a hair below: rounded twice, up
@example((-1.0 - 2.0**-20, 2.0**-24 * (1 - 2.0**-20), -1.0 - 2.0**-23))
@example((-1.0 - 2.0**-23, 2.0**-24, 1.0 + 2.0**-22))
@example((2.0**-75, 2.0**-75, 2.0**-149))  # half the smallest number on top of it
@example((2.0**-75, 2.0**-75, 0.0))
@example((-(2.0**-100), 2.0**-100, 0.0))  # rounds to minus zero
def test_fma_is_rounded_once(abc: tuple[float, float, float]) -> None:
    a, b, c = (np.float32(v) for v in abc)
    check_fused(arithmetic.fma(np.array([a]), np.array([b]), np.array([c]))[0], *abc)


@inputs.many
@given(st.tuples(st.integers(2**23, 2**24 - 1), st.integers(2**23, 2**24 - 1), st.integers(0, 60)))
def test_fma_is_rounded_once_where_doubles_are_inexact(numbers: tuple[int, int, int]) -> None:
    """48 bits of product against an addend up to 60 places away: more than a float64 holds."""
    m, n, shift = numbers
    a, b = math.ldexp(m, -23), math.ldexp(n, -23)
    for c in (math.ldexp(m ^ 1, shift - 40), -math.ldexp(n ^ 3, shift - 40)):
        check_fused(arithmetic.fma(np.float32([a]), np.float32([b]), np.float32([c]))[0], a, b, c)


@inputs.some
@given(seed=inputs.seeds, flavour=inputs.flavours)
def test_nearest_rounds_ties_to_even(seed: int, flavour: str) -> None:
    x = inputs.floats(seed, flavour, 64, large=4e6)
    x[:16] = np.arange(-8, 8) + np.float32(0.5)
    found = arithmetic.nearest(x)
    assert [float(v) for v in found] == [round(float(v)) for v in x]


EXPONENTS = np.concatenate(
    [
        np.linspace(arithmetic.EXP_MIN, arithmetic.EXP_MAX, 400_003, dtype=np.float32),
        (np.arange(-125, 127) * math.log(2)).astype(np.float32),
        ((np.arange(-125, 125) + 0.5) * math.log(2)).astype(np.float32),  # where the reduction turns
        np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-8]),
    ]
)


def test_exp_is_within_3e_7() -> None:
    exact = np.exp(EXPONENTS.astype(np.float64))
    error = np.abs(arithmetic.exp(EXPONENTS) - exact) / exact
    assert error.max() < 3e-7


def test_exp_clamps() -> None:
    ends = arithmetic.exp(np.float32([-87, 88]))
    inputs.same(arithmetic.exp(np.float32([-1e38, 1e38])), ends)
    np.testing.assert_allclose(ends, [math.exp(-87), math.exp(88)], rtol=3e-7)


def test_sum_lanes_adds_halves() -> None:
    lanes = inputs.uniform("lanes", 16)
    a = lanes
    while len(a) > 1:
        a = [np.float32(a[i] + a[i + len(a) // 2]) for i in range(len(a) // 2)]  # type: ignore[assignment]
    inputs.same(np.atleast_1d(arithmetic.sum_lanes(lanes)), np.float32([a[0]]))


# ---- compiled --------------------------------------------------------------------------------


def vectors(step: Any) -> Any:
    """Compile `step(a, b, c, i, out)` for all whole vectors of arrays. Not cached: it is no kernel."""

    @numba.njit(error_model="numpy")
    def run(a, b, c, out):  # type: ignore[no-untyped-def]
        for i in range(0, out.size, 16):
            step(a, b, c, i, out)

    return run


@pytest.mark.compiled
def test_compiled_fma_equals_its_twin() -> None:
    @numba.njit
    def step(a, b, c, i, out):  # type: ignore[no-untyped-def]
        v = simd.fma(simd.load_f32(a, i), simd.load_f32(b, i), simd.load_f32(c, i))
        simd.store_f32(out, i, v)

    @numba.njit
    def singly(a, b, c, out):  # type: ignore[no-untyped-def]
        for i in range(out.size):
            out[i] = elementwise.fma(a[i], b[i], c[i])

    run = vectors(step)
    for flavour in inputs.FLAVOURS:
        a, b, c = (inputs.floats((flavour, n), flavour, 4096, large=1e15) for n in "abc")
        c[:1024] = -(a[:1024] * b[:1024])
        found, one = np.zeros(4096, np.float32), np.zeros(4096, np.float32)
        run(a, b, c, found)
        singly(a, b, c, one)
        inputs.same(found, arithmetic.fma(a, b, c))
        inputs.same(one, found)


@pytest.mark.compiled
def test_compiled_exp_and_nearest_equal_their_twins() -> None:
    @numba.njit
    def exp(a, b, c, i, out):  # type: ignore[no-untyped-def]
        simd.store_f32(out, i, elementwise.exp(simd.load_f32(a, i)))

    @numba.njit
    def nearest(a, b, c, i, out):  # type: ignore[no-untyped-def]
        simd.store_f32(out, i, simd.nearest(simd.load_f32(a, i)))

    x = np.concatenate([EXPONENTS, np.float32([-1e38, 1e38, -87.5, 88.5])])
    x = np.concatenate([x, np.zeros(-x.size % 16, np.float32)])
    found = np.empty_like(x)
    vectors(exp)(x, x, x, found)
    inputs.same(found, arithmetic.exp(x))
    x = inputs.floats("nearest", "mixed", 4096, large=4e6)
    found = np.empty_like(x)
    vectors(nearest)(x, x, x, found)
    inputs.same(found, arithmetic.nearest(x))


@pytest.mark.compiled
def test_every_half_is_read_exactly() -> None:
    @numba.njit
    def read(a, b, c, i, out):  # type: ignore[no-untyped-def]
        simd.store_f32(out, i, simd.load_f16(a, i))

    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = np.concatenate([halves[np.isfinite(halves)], np.zeros(16, np.float16)])
    halves = halves[: halves.size // 16 * 16]
    found = np.zeros(halves.size, np.float32)
    vectors(read)(halves.view(np.uint16), found, found, found)
    inputs.same(found, halves.astype(np.float32))


@pytest.mark.compiled
def test_floats_are_rounded_to_halves_to_nearest_even() -> None:
    @numba.njit
    def write(a, b, c, i, out):  # type: ignore[no-untyped-def]
        simd.store_f16(out, i, simd.load_f32(a, i))

    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16)
    exact = np.sort(halves[np.isfinite(halves)].astype(np.float64))
    middle = (exact[1:] + exact[:-1]) / 2  # every tie
    x = np.concatenate([exact, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9)])
    x32 = np.concatenate([x, -x]).astype(np.float32)
    x32 = np.concatenate([x32, inputs.floats("halves", "mixed", 8192, large=6e4)])
    x32 = np.concatenate([x32, np.zeros(-x32.size % 16, np.float32)])
    found = np.zeros(x32.size, np.uint16)
    vectors(write)(x32, x32, x32, found)
    inputs.same(found, x32.astype(np.float16).view(np.uint16))


@pytest.mark.compiled
def test_kernels_are_compiled_where_the_jit_is_on() -> None:
    assert jit.JIT
    assert isinstance(elementwise.exp, numba.core.dispatcher.Dispatcher)
