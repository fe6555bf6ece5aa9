"""How often a calibration text used each expert, as a file records it."""

import json
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.errors import ModelFileError

USES_KEY: Final = "expert_uses"
"""The metadata: a JSON list of L lists, of E counts of tokens each, empty for a layer without experts."""


def uses_metadata(uses: NDArray[np.int64], spec: ModelSpec) -> dict[str, str]:
    """The metadata of counts [L, E]."""
    rows = [uses[layer].tolist() if spec.has_experts(layer) else [] for layer in range(spec.layers)]
    return {USES_KEY: json.dumps(rows, separators=(",", ":"))}


def uses_in(metadata: Mapping[str, str], spec: ModelSpec) -> NDArray[np.int64] | None:
    """Counts [L, E], 0 in layers without experts; None where nothing was recorded.

    Raises ModelFileError for anything but one whole number >= 0 for each expert.
    """
    text = metadata.get(USES_KEY)
    if text is None:
        return None
    counts = [spec.experts if spec.has_experts(layer) else 0 for layer in range(spec.layers)]
    try:
        rows = json.loads(text)
        good = [len(row) for row in rows] == counts and all(
            type(count) is int and 0 <= count < 1 << 62 for row in rows for count in row
        )
    except (ValueError, TypeError, RecursionError):
        good = False
    if not good:
        raise ModelFileError(
            f"found metadata {USES_KEY!r} of another form, expected a count for each of {spec.experts} "
            f"experts of {spec.layers} layers; convert the model again"
        )
    uses = np.zeros((spec.layers, max(1, spec.experts)), np.int64)
    for layer, row in enumerate(rows):
        uses[layer, : len(row)] = row
    return uses
