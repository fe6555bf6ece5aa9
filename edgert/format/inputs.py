"""Below which magnitude the inputs of a file's products are taken for zero."""

from dataclasses import dataclass
from typing import Any, Final

from edgert.config import DOWN, ModelSpec
from edgert.format.header import parse_object
from edgert.format.rules import Rule, broken, shown

INPUTS_KEY: Final = "inputs"  # of __metadata__
_FIELDS: Final = {"share", "thresholds", "zeros"}
PLACES: Final = DOWN + 1


@dataclass(frozen=True, slots=True)
class InputThresholds:
    """Found on the text of a calibration: per layer, at the places of config.py."""

    share: float  # of the weights of all products, that was to meet zeros
    thresholds: tuple[tuple[float, ...], ...]
    zeros: tuple[tuple[float, ...], ...]  # the share of inputs below it

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: getattr(self, name) for name in ("share", "thresholds", "zeros")}


def can_have_inputs(spec: ModelSpec) -> bool:
    """Whether the inputs of this model's products can have thresholds: a plain one, with norms in front."""
    return spec.block == "pre" and not (spec.experts or spec.latent or spec.outliers or spec.neurons)


def read_inputs(text: str | None, spec: ModelSpec) -> InputThresholds | None:
    """From the metadata string; FormatError (F35) unless it fits the model."""
    if text is None:
        return None
    values = parse_object(text, "the thresholds of inputs")
    if set(values) != _FIELDS:
        raise broken(Rule.INPUTS, f"the keys {shown(list(values))}", f"{sorted(_FIELDS)}")
    if not can_have_inputs(spec):
        raise broken(Rule.INPUTS, f"thresholds in a {spec.block} block of {spec.architecture}", "none")
    share = values["share"]
    if not _is_number(share, 1) or share == 1:
        raise broken(Rule.INPUTS, f"a share of {shown(share)}", "a number from 0 and below 1")
    for name, most in (("thresholds", 1e30), ("zeros", 1)):
        rows = values[name] if isinstance(values[name], list) else []
        if len(rows) != spec.layers or not all(_are_numbers(row, most) for row in rows):
            expected = f"{spec.layers} lists of {PLACES} numbers from 0 to {most:g}"
            raise broken(Rule.INPUTS, f"{name} {shown(values[name])}", expected)
    thresholds, zeros = (
        tuple(tuple(map(float, row)) for row in values[name]) for name in ("thresholds", "zeros")
    )
    return InputThresholds(float(share), thresholds, zeros)


def _is_number(value: object, most: float) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= most


def _are_numbers(values: object, most: float) -> bool:
    return isinstance(values, list) and len(values) == PLACES and all(_is_number(v, most) for v in values)
