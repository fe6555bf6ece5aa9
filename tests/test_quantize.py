"""The quantisers: what they guarantee for any weights, and how they do on named distributions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.converters.quantize import (
    LARGEST,
    dequantize,
    quantize_q4,
    quantize_q8,
    relative_error,
)
from edgert.errors import ConversionError

Floats = NDArray[np.float32]


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
    for quantize, low, high in ((quantize_q4, -8, 7), (quantize_q8, -127, 127)):
        values, scales = quantize(weights)
        assert values.shape == (rows, columns)
        assert scales.shape == (rows, -(-columns // 32))
        assert values.dtype == np.int8 and scales.dtype == np.float16
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
    for quantize in (quantize_q4, quantize_q8):
        restored = dequantize(*quantize(weights))
        assert np.all(np.abs(restored) <= np.abs(weights).max() * 1.5)
        assert np.square(weights - restored, dtype=np.float64).sum() <= (
            np.square(weights, dtype=np.float64).sum() * (1 + 1e-6)
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weights_are_kept_and_larger_ones_refused(sign: int) -> None:
    for quant, quantize in (("q4", quantize_q4), ("q8", quantize_q8)):
        weights = np.zeros((1, 32), np.float32)
        weights[0, 5] = sign * LARGEST[quant]
        np.testing.assert_allclose(dequantize(*quantize(weights)), weights, rtol=1e-3)
        weights[0, 5] *= 1.01
        with pytest.raises(ConversionError, match="needs --quant f32"):
            quantize(weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantize", [quantize_q4, quantize_q8])
def test_nan_and_infinity_are_refused_with_the_tensor_named(quantize: object, bad: float) -> None:
    assert callable(quantize)
    weights = np.ones((20, 40), np.float32)
    weights[17, 39] = bad
    with pytest.raises(ConversionError, match=r"layers\.3\.up: found NaN or infinity"):
        quantize(weights, name="layers.3.up")


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
