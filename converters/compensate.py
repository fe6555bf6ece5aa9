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
    Codes,
    Distortion,
    Floats,
    check_weights,
    measured,
    round_codes,
    search,
)
from edgert.kernels.packing import GROUP

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
    left = np.ascontiguousarray(weights.T)  # [K, N] the weights as the columns before have changed them
    codes = np.empty((columns, rows), np.int8)
    scales: list[Floats] = []
    minimums: list[Floats] = []
    for start in range(0, columns, GROUP):
        end = min(start + GROUP, columns)
        block, answer = left[start:end], errors.answer[start:end]
        scale, minimum = search(block, quant, errors.weight[start:end])
        made = np.empty_like(block)
        for j, column in enumerate(block):
            code = round_codes(column, quant, scale, minimum)
            restored = code * scale if minimum is None else code * scale + minimum
            made[j] = (column - restored) / answer[j, start + j]
            codes[start + j] = code
            block[j + 1 :] -= answer[j, start + j + 1 : end, None] * made[j]
        left[end:] -= answer[:, end:].T @ made
        scales.append(scale)
        if minimum is not None:
            minimums.append(minimum)
    least = np.stack(minimums, axis=1) if minimums else None
    return Codes(np.ascontiguousarray(codes.T), np.stack(scales, axis=1), least)


def round_weights(weights: Floats, quant: str, errors: Errors | None, name: str) -> tuple[Codes, Distortion]:
    """float32 [N, K] to codes, `compensated` where `errors` are known, and what is lost."""
    if errors is None:
        return measured(weights, quant, name=name)
    codes, lost = compensated(weights, errors, quant, name), Distortion()
    lost.add(weights, codes.floats())
    return codes, lost
