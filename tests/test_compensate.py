"""Rounding that makes up for its own errors: the algebra behind it, and what it gains."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.converters.compensate import DAMPING, Errors, compensated
from edgert.converters.quantize import dequantize, quantize
from edgert.errors import ConversionError

Floats = NDArray[np.float32]


def quantize_q4(weights: Floats, importance: Floats | None = None, name: str = "m") -> Any:
    codes = quantize(weights, "q4", importance, name)
    return codes.values, codes.scales


def compensated_q4(weights: Floats, errors: Errors, name: str = "m") -> Any:
    codes = compensated(weights, errors, "q4", name)
    return codes.values, codes.scales


def correlated(columns: int, rows: int = 2000, rank: int = 12) -> Floats:
    """Rows whose columns go together, some of them large: as activations are."""
    rng = np.random.default_rng(columns)
    mixed = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    mixed += 0.5 * rng.standard_normal((rows, columns))
    return np.asarray(mixed * rng.lognormal(0, 1, columns), np.float32)


def weights(rows: int, columns: int) -> Floats:
    return np.random.default_rng(5).standard_normal((rows, columns)).astype(np.float32)


def product_error(gram: Floats, original: Floats, restored: Floats) -> float:
    """The mean square of what the products lose."""
    e = original.astype(np.float64) - restored
    return float(np.einsum("nk,kl,nl->", e, gram.astype(np.float64), e))


@pytest.mark.parametrize("columns", [32, 64, 75])
def test_answers_are_those_of_the_inverse(columns: int) -> None:
    x = correlated(columns)
    gram = x.T @ x / np.float32(len(x))
    u = Errors(gram).answer.astype(np.float64)
    assert np.all(u == np.triu(u))
    damped = gram + np.eye(columns) * DAMPING * np.trace(gram) / columns
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(columns), atol=1e-3)


@pytest.mark.parametrize("columns", [64, 75, 172])
def test_products_lose_less_than_half_of_what_the_plain_search_costs_them(columns: int) -> None:
    x, w = correlated(columns), weights(40, columns)
    gram = x.T @ x / np.float32(len(x))
    plain = product_error(gram, w, dequantize(*quantize_q4(w)))
    weighted = product_error(gram, w, dequantize(*quantize_q4(w, np.diag(gram).copy())))
    found = product_error(gram, w, dequantize(*compensated_q4(w, Errors(gram))))
    assert found < 0.5 * plain
    assert found < 0.6 * weighted


def test_columns_that_do_not_go_together_are_rounded_as_the_plain_search_does() -> None:
    w = weights(24, 96)
    values, scales = compensated_q4(w, Errors(np.eye(96, dtype=np.float32)))
    expected_values, expected_scales = quantize_q4(w)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(values, expected_values)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x, w = correlated(75), weights(40, 75)
    errors = Errors(x.T @ x / np.float32(len(x)))
    values, scales = compensated_q4(w, errors)
    some_values, some_scales = compensated_q4(w[10:20], errors)
    np.testing.assert_array_equal(values[10:20], some_values)
    np.testing.assert_array_equal(scales[10:20], some_scales)


@pytest.mark.parametrize("rows", [0, 1, 20])
def test_a_text_of_few_rows_does_no_harm(rows: int) -> None:
    """Fewer rows than columns, dead columns, or no activation at all."""
    x = correlated(64, 2000)[:rows]
    gram = np.zeros((64, 64), np.float32) if rows == 0 else x.T @ x / np.float32(rows)
    gram[:, 7] = gram[7] = 0
    w = weights(16, 64)
    restored = dequantize(*compensated_q4(w, Errors(gram)))
    assert np.isfinite(restored).all()
    plain = product_error(gram, w, dequantize(*quantize_q4(w)))
    assert product_error(gram, w, restored) <= plain * 1.001


def test_damaged_weights_are_refused() -> None:
    w = weights(16, 32)
    w[3, 4] = np.nan
    with pytest.raises(ConversionError, match=r"layers\.0\.q: found NaN or infinity"):
        compensated_q4(w, Errors(np.eye(32, dtype=np.float32)), "layers.0.q")
