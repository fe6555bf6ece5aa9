"""Rounding a matrix so that its products change least: each column's error is made up for by the next ones.

GPTQ (Frantar et al., 2022, arXiv:2210.17323): with G the mean of x x^T over the rows x that a matrix meets,
the squared error of the product W x is on average e G e^T for a row's error e. Columns are rounded one
after another; the best answer of the columns that are left to the error made in column j is known in
closed form from the Cholesky factor of G^-1. Scales are searched group by group, on the weights as they
are when their group's turn comes.
"""

from typing import Final

import numpy as np

from edgert.converters.quantize import (
    SEARCHES,
    Codes,
    Distortion,
    Floats,
    check_weights,
    measured,
    search_into,
)
from edgert.kernels import rounding
from edgert.kernels.packing import BLOCK, GROUP

COMPENSATED: Final = ("q4m", "q4", "q4s", "q3", "q2")
"""The quantisations for which it is done; the error of q8 is below that of the products themselves."""
DAMPING: Final = 0.01
"""Added to the diagonal of G, as a share of its mean: as published. It also makes G positive definite where
there were fewer rows than columns, or a column that is always zero."""


class Errors:
    """What an error in one column of a matrix does, and what the columns after it can do about it."""

    def __init__(self, gram: Floats) -> None:
        """gram: float32 [K, K], the mean of x x^T."""
        columns = len(gram)
        # In float64: a text of few rows leaves G close to singular.
        damped = gram.astype(np.float64)
        power = float(np.trace(damped)) / columns
        damped[np.diag_indices(columns)] += DAMPING * power if power > 0 else 1.0
        # G^-1 = U^T U with U upper: from the lower factor of G with its order reversed, L L^T = J G J,
        # G^-1 = (J L^-T J)(J L^-1 J), the second of which is upper.
        lower = np.linalg.cholesky(damped[::-1, ::-1])
        upper = np.triu(np.linalg.solve(lower, np.eye(columns))[::-1, ::-1])
        self.answer: Floats = np.ascontiguousarray(upper, np.float32)  # [K, K] U
        # [K] of a column's squared error where a scale is searched. GPTQ's own 1 / diag(U)^2, of the error
        # that the columns left cannot make up for, comes out no better (docs/quality.md).
        self.weight: Floats = np.diag(damped).astype(np.float32)


def compensated(weights: Floats, errors: Errors, quant: str, name: str = "matrix") -> Codes:
    """float32 [N, K] to whole numbers and scales of `quant`, one of COMPENSATED.

    Raises ConversionError as `check_weights`.
    """
    check_weights(weights, quant, name)
    rows, columns = weights.shape
    # [K, N] the weights as the columns before have changed them; N padded with zeros, which stay zeros.
    left = np.zeros((columns, -(-rows // BLOCK) * BLOCK), np.float32)
    left[:, :rows] = weights.T
    codes, made = np.empty(left.shape, np.int8), np.empty((GROUP, left.shape[1]), np.float32)
    scales, minimums = np.empty((2, -(-columns // GROUP), left.shape[1]), np.float32)
    for g, start in enumerate(range(0, columns, GROUP)):
        end = min(start + GROUP, columns)
        answer, part = np.ascontiguousarray(errors.answer[start:end, start:end]), made[: end - start]
        search_into(left[start:end], quant, errors.weight[start:end], scales[g], minimums[g])
        low, high = SEARCHES[quant].low, SEARCHES[quant].high
        rounding.round_group(
            low, high, left[start:end], answer, scales[g], minimums[g], codes[start:end], part
        )
        left[end:, :rows] -= errors.answer[start:end, end:].T @ part[:, :rows]
    values, each, least = (np.ascontiguousarray(found.T[:rows]) for found in (codes, scales, minimums))
    return Codes(values, each, least if quant == "q4m" else None)


def round_weights(weights: Floats, quant: str, errors: Errors | None, name: str) -> tuple[Codes, Distortion]:
    """float32 [N, K] to codes, `compensated` where `errors` are known, and what is lost."""
    if errors is None:
        return measured(weights, quant, name=name)
    codes, lost = compensated(weights, errors, quant, name), Distortion()
    lost.add(weights, codes.floats())
    return codes, lost
