"""Which columns of a file's matrices are stored apart: numbers that compiled code follows, checked first."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.format.rules import Rule, broken
from edgert.format.tensors import INPUTS, StoredTensor


def check_outliers(spec: ModelSpec, tensors: Mapping[str, StoredTensor], data: NDArray[np.uint8]) -> None:
    """Raise FormatError (F34) unless all columns are ascending whole numbers inside their matrices."""
    if not spec.outliers:
        return
    for layer in range(spec.first_layer, spec.last_layer):
        for name, kinds in INPUTS.items():
            stored = tensors[f"layers.{layer}.{name}_columns"]
            width = tensors[f"layers.{layer}.{kinds[-1]}"].shape[1]
            values: NDArray[Any] = data[stored.offset : stored.offset + stored.nbytes].view("<f4")
            whole = np.isfinite(values).all() and (values == np.floor(values)).all()
            if not whole or values[0] < 0 or values[-1] >= width or (np.diff(values) < 1).any():
                raise broken(
                    Rule.OUTLIERS,
                    f"columns in {stored.name} that are not whole, not ascending or not in the matrix",
                    f"ascending numbers from 0 to {width - 1}",
                )
