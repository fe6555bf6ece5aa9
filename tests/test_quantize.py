"""The quantisers: what they guarantee for any weights, and how they do on named distributions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.converters.quantize import (
    CODE_RANGE,
    LARGEST,
    Codes,
    dequantize,
    quantize,
    relative_error,
)
from edgert.errors import ConversionError
from edgert.kernels.packing import byte_scales

Floats = NDArray[np.float32]


def quantize_q4(weights: Floats, importance: Floats | None = None, name: str = "m") -> Any:
    codes = quantize(weights, "q4", importance, name)
    return codes.values, codes.scales


def quantize_q8(weights: Floats, name: str = "m") -> Any:
    codes = quantize(weights, "q8", name=name)
    return codes.values, codes.scales


def plain_q4_0(weights: Floats) -> Floats:
    """The Q4_0 round trip of ggml-quants.c: d = extreme / -8 in float16, integers by the exact d."""
    groups = weights.reshape(-1, 32)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    d = extreme / np.float32(-8)
    inverse = np.divide(1, d, out=np.zeros_like(d), where=d != 0)
    values = np.clip(np.trunc(groups * inverse + np.float32(8.5)), 0, 15) - 8
    return np.asarray(values * d.astype(np.float16).astype(np.float32), np.float32).reshape(weights.shape)


def q4_round_trip(weights: Floats) -> Floats:
    return dequantize(*quantize_q4(weights))


def group_errors(weights: Floats, restored: Floats) -> NDArray[np.float64]:
    difference = weights.astype(np.float64) - restored
    return np.asarray((difference**2).reshape(-1, 32).sum(axis=1))


def distributions() -> dict[str, Floats]:
    rng = np.random.default_rng(7)
    shape = (64, 512)
    gaussian = rng.standard_normal(shape)
    outlier = gaussian.copy()
    outlier[:, ::32] *= 30
    return {
        name: np.asarray(values, np.float32)
        for name, values in {
            "gaussian": gaussian,
            "small gaussian": gaussian * 0.02,
            "laplace": rng.laplace(size=shape),
            "uniform": rng.uniform(-1, 1, shape),
            "one outlier per group": outlier,
            "only positive": np.abs(gaussian),
        }.items()
    }


DISTRIBUTIONS = distributions()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_q4_beats_plain_q4_0_on(name: str) -> None:
    weights = DISTRIBUTIONS[name]
    ratio = relative_error(weights, q4_round_trip(weights)) / relative_error(weights, plain_q4_0(weights))
    assert ratio < 0.995


def test_q4_gains_what_the_search_is_known_to_gain_on_gaussian_weights() -> None:
    """The figure of an exhaustive search over 320 scales is 0.0809, of plain Q4_0 0.0860."""
    assert relative_error(DISTRIBUTIONS["gaussian"], q4_round_trip(DISTRIBUTIONS["gaussian"])) < 0.0815


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_no_group_is_worse_than_in_plain_q4_0(name: str) -> None:
    weights = DISTRIBUTIONS[name]
    ours, plain = (group_errors(weights, f(weights)) for f in (q4_round_trip, plain_q4_0))
    assert np.all(ours <= plain * (1 + 1e-5))


def test_the_plain_q4_0_of_this_file_is_that_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    weights = DISTRIBUTIONS["gaussian"]
    kind = gguf.GGMLQuantizationType.Q4_0
    oracle = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    np.testing.assert_array_equal(plain_q4_0(weights), oracle)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 100),
    exponent=st.integers(-30, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_shape_and_size_of_weights_stays_in_range(
    rows: int, columns: int, exponent: int, seed: int
) -> None:
    weights = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    weights *= np.float32(10.0**exponent)
    for rounded, low, high in ((quantize_q4, -8, 7), (quantize_q8, -127, 127)):
        values, scales = rounded(weights)
        assert values.shape == (rows, columns)
        assert scales.shape == (rows, -(-columns // 32))
        assert values.dtype == np.int8 and np.array_equal(scales, scales.astype(np.float16))
        assert low <= values.min() and values.max() <= high
        assert np.isfinite(scales).all()
        energy = np.square(weights, dtype=np.float64).sum()
        restored = dequantize(values, scales)
        assert np.square(weights.astype(np.float64) - restored).sum() <= energy * (1 + 1e-6)


def test_q8_is_within_half_a_step_and_the_rounding_of_its_scale() -> None:
    weights = DISTRIBUTIONS["gaussian"]
    values, scales = quantize_q8(weights)
    step = np.repeat(scales.astype(np.float32), 32, axis=1)
    # The scale is rounded by up to 2**-11, which the largest integer, 127, multiplies.
    assert np.all(np.abs(weights - dequantize(values, scales)) <= step * (0.5 + 127 * 2.0**-11))


@pytest.mark.parametrize("quantize", [quantize_q4, quantize_q8])
def test_groups_of_zeros_have_scale_zero_and_come_back_as_zeros(quantize: object) -> None:
    assert callable(quantize)
    weights = np.ones((16, 96), np.float32)
    weights[:, 32:64] = 0
    values, scales = quantize(weights)
    assert not values[:, 32:64].any() and not scales[:, 1].any()
    assert scales[:, [0, 2]].all()


@pytest.mark.parametrize("constant", [1.0, -1.0, 0.375, 65504.0])
def test_a_constant_that_float16_holds_comes_back(constant: float) -> None:
    weights = np.full((16, 64), constant, np.float32)
    np.testing.assert_allclose(q4_round_trip(weights), weights, rtol=2e-3)
    np.testing.assert_allclose(dequantize(*quantize_q8(weights)), weights, rtol=2e-3)


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-9, 5e-8, 2e-6, 3e-5])
def test_weights_below_the_range_of_float16_scales_lose_no_more_than_themselves(size: float) -> None:
    weights = (DISTRIBUTIONS["gaussian"] * np.float32(size)).astype(np.float32)
    for rounded in (quantize_q4, quantize_q8):
        restored = dequantize(*rounded(weights))
        assert np.all(np.abs(restored) <= np.abs(weights).max() * 1.5)
        assert np.square(weights - restored, dtype=np.float64).sum() <= (
            np.square(weights, dtype=np.float64).sum() * (1 + 1e-6)
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weights_are_kept_and_larger_ones_refused(sign: int) -> None:
    for quant, rounded in (("q4", quantize_q4), ("q8", quantize_q8)):
        weights = np.zeros((1, 32), np.float32)
        weights[0, 5] = sign * LARGEST[quant]
        np.testing.assert_allclose(dequantize(*rounded(weights)), weights, rtol=1e-3)
        weights[0, 5] *= 1.01
        with pytest.raises(ConversionError, match="needs --quant f32"):
            rounded(weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", CODE_RANGE)
def test_nan_and_infinity_are_refused_with_the_tensor_named(quant: str, bad: float) -> None:
    weights = np.ones((20, 40), np.float32)
    weights[17, 39] = bad
    with pytest.raises(ConversionError, match=r"layers\.3\.up: found NaN or infinity"):
        quantize(weights, quant, name="layers.3.up")


def test_importance_lowers_the_error_of_the_columns_that_matter() -> None:
    weights = DISTRIBUTIONS["gaussian"]
    importance = np.ones(weights.shape[1], np.float32)
    importance[::4] = 50
    values, scales = quantize_q4(weights, importance)
    guided = np.square(weights - dequantize(values, scales))
    blind = np.square(weights - q4_round_trip(weights))
    assert (guided * importance).sum() < 0.9 * (blind * importance).sum()
    assert guided[:, ::4].sum() < blind[:, ::4].sum()


def test_equal_importance_changes_nothing() -> None:
    weights = DISTRIBUTIONS["laplace"]
    for one, other in zip(
        quantize_q4(weights, np.ones(weights.shape[1], np.float32)), quantize_q4(weights), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    weights = np.random.default_rng(3).standard_normal((300, 200)).astype(np.float32)
    values, scales = quantize_q4(weights)
    for row in (0, 163, 299):
        alone = quantize_q4(weights[row : row + 1])
        np.testing.assert_array_equal(alone[0][0], values[row])
        np.testing.assert_array_equal(alone[1][0], scales[row])


def test_relative_error_is_rms_over_rms() -> None:
    assert relative_error(np.full((2, 2), 4, np.float32), np.full((2, 2), 3, np.float32)) == 0.25
    assert relative_error(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32)) == 0


BEST_UNIFORM = {"q2": 0.1188, "q3": 0.03744, "q4m": 0.01154}
"""The squared error of the best uniform quantiser of 4, 8 and 16 levels for Gaussian values (Max, 1960,
IRE Transactions on Information Theory 6(1), table II), which has one scale for all of them."""


@pytest.mark.parametrize("quant", BEST_UNIFORM)
def test_scales_of_groups_beat_the_best_single_one_on_gaussian_weights(quant: str) -> None:
    weights = DISTRIBUTIONS["gaussian"]
    error = relative_error(weights, quantize(weights, quant).floats()) ** 2
    assert error < 0.95 * BEST_UNIFORM[quant]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("quant", ["q4s", "q3", "q2"])
def test_byte_scales_are_within_a_tenth_of_a_search_over_all_of_them(name: str, quant: str) -> None:
    weights = DISTRIBUTIONS[name][:4] * np.float32(0.1)
    groups = weights.reshape(-1, 32).T.astype(np.float64)
    low, high = CODE_RANGE[quant]
    least = np.square(groups).sum(axis=0)
    for scale in np.unique(byte_scales(np.linspace(-7.5, 7.5, 100_000))).astype(np.float64):
        if scale:
            codes = np.clip(np.rint(groups / scale), low, high)
            least = np.minimum(least, np.square(groups - codes * scale).sum(axis=0))
    found = group_errors(weights, quantize(weights, quant).floats())
    assert found.sum() < 1.1 * least.sum()
    assert np.all(found <= np.square(groups).sum(axis=0) * (1 + 1e-6))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_minimum_lowers_the_error(name: str) -> None:
    weights = DISTRIBUTIONS[name]
    plain, line = (relative_error(weights, quantize(weights, quant).floats()) for quant in ("q4", "q4m"))
    assert line < (0.55 if name == "only positive" else 0.99) * plain


@pytest.mark.parametrize("quant", ["q4m", "q4s", "q3", "q2"])
@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 100),
    exponent=st.integers(-30, 0),
    seed=st.integers(0, 2**32 - 1),
)
def test_few_bits_take_every_shape_and_size_of_weights(
    quant: str, rows: int, columns: int, exponent: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = np.clip(rng.standard_normal((rows, columns)), -3, 3).astype(np.float32)
    weights *= np.float32(10.0**exponent)
    codes = quantize(weights, quant)
    assert codes.fit(quant)
    low, high = CODE_RANGE[quant]
    assert codes.values.min() >= low and codes.values.max() <= high
    error, energy = (np.square(x, dtype=np.float64).sum() for x in (weights - codes.floats(), weights))
    assert error <= energy * (1 + 1e-5)
    alone = quantize(weights[-1:], quant)
    np.testing.assert_array_equal(alone.values, codes.values[-1:])


def test_types_hold_no_more_than_they_can() -> None:
    values = np.array([[3, -4] * 16], np.int8)
    one, third = (
        np.ones((1, 1), np.float32),
        np.full((1, 1), 1 / 3, np.float32).astype(np.float16).astype(np.float32),
    )
    assert Codes(values, one).fit("q3") and Codes(values, one).fit("q4") and not Codes(values, one).fit("q2")
    assert not Codes(values, third).fit("q3")  # more digits than a byte has
    assert Codes(values, third).fit("q4")
    assert not Codes(values, one, one).fit("q4") and not Codes(values, one).fit("q4m")
    assert Codes(values + 4, one, third).fit("q4m")
    assert not Codes(values + 4, one, np.full((1, 1), np.nan, np.float32)).fit("q4m")
