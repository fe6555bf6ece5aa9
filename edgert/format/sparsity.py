"""How often the neurons of a file fire, and below which activation they are taken for silent."""

import math
from dataclasses import dataclass
from typing import Any, Final

from edgert.format.header import parse_object
from edgert.format.rules import Rule, broken, shown

SPARSITY_KEY: Final = "sparsity"  # of __metadata__
_FIELDS: Final = {"share", "thresholds", "zeros", "firing"}
QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the neurons of a layer, for which `firing` says how often they fire."""


@dataclass(frozen=True, slots=True)
class SparsityCalibration:
    """What was counted on the text of a calibration, per layer."""

    share: float  # of activations that were to be zero; 0 where only those count that are so by themselves
    thresholds: tuple[float, ...]  # activations below are taken for zero; all 0 where share is
    zeros: tuple[float, ...]  # the share of activations that are zero then
    firing: tuple[tuple[float, ...], ...]  # how often a neuron is not exactly zero, at QUANTILES of them

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: getattr(self, name) for name in ("share", "thresholds", "zeros", "firing")}


def read_sparsity(text: str | None, layers: int) -> SparsityCalibration | None:
    """The calibration from the metadata string; FormatError (F32) unless it fits a model of `layers`."""
    if text is None:
        return None
    values = parse_object(text, "the sparsity")
    if set(values) != _FIELDS:
        raise broken(Rule.SPARSITY, f"the keys {shown(list(values))}", f"{sorted(_FIELDS)}")
    share, thresholds = values["share"], values["thresholds"]
    if not _is_number(share) or not 0 <= share < 1:
        raise broken(Rule.SPARSITY, f"a share of {shown(share)}", "a number from 0 and below 1")
    if not _are_numbers(thresholds, layers, 1e30):
        raise broken(Rule.SPARSITY, f"thresholds {shown(thresholds)}", f"{layers} numbers >= 0")
    zeros, firing = values["zeros"], values["firing"]
    if not _are_numbers(zeros, layers, 1):
        raise broken(Rule.SPARSITY, f"zeros {shown(zeros)}", f"{layers} numbers from 0 to 1")
    rows = firing if isinstance(firing, list) else []
    if len(rows) != layers or not all(_are_numbers(row, len(QUANTILES), 1) for row in rows):
        expected = f"{layers} lists of {len(QUANTILES)} numbers from 0 to 1"
        raise broken(Rule.SPARSITY, f"firing {shown(firing)}", expected)
    return SparsityCalibration(
        float(share),
        tuple(map(float, thresholds)),
        tuple(map(float, zeros)),
        tuple(tuple(map(float, row)) for row in rows),
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _are_numbers(values: object, count: int, most: float) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(_is_number(value) and 0 <= value <= most for value in values)
