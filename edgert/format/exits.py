"""What the heads of a file's exits were measured to be worth: a temperature and agreement by confidence."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from edgert.errors import FormatError
from edgert.format.header import parse_object
from edgert.format.rules import Rule, broken, shown

EXITS_KEY: Final = "exits"  # of __metadata__
_FIELDS: Final = {"temperature", "confidence", "tokens", "agreed"}
_MOST_BUCKETS: Final = 1000


@dataclass(frozen=True, slots=True)
class ExitCalibration:
    """How far to trust an exit, counted on text that its head was not trained on.

    Confidence is the largest probability of softmax(logits / temperature) (Guo et al., 2017,
    arXiv:1706.04599). Bucket i counts the tokens whose confidence is at least `confidence[i]` and below
    `confidence[i + 1]`; the last reaches to 1.
    """

    temperature: float
    confidence: tuple[float, ...]  # lower bounds of the buckets, ascending from 0
    tokens: tuple[int, ...]  # in each bucket
    agreed: tuple[int, ...]  # of these, where the exit's first choice was the whole model's

    def above(self, threshold: float) -> tuple[float, float]:
        """(share of tokens, agreement among them) in the buckets that start at `threshold` or higher.

        Both are 0 where no token was so sure.
        """
        kept = [i for i, bound in enumerate(self.confidence) if bound >= threshold]
        tokens, agreed = sum(self.tokens[i] for i in kept), sum(self.agreed[i] for i in kept)
        return (tokens / sum(self.tokens), agreed / tokens) if tokens else (0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: getattr(self, name) for name in ("temperature", "confidence", "tokens", "agreed")}


def read_exits(text: str | None, layers: tuple[int, ...]) -> dict[int, ExitCalibration]:
    """The calibration of each exit from the metadata string; FormatError (F31) unless it fits `layers`."""
    if text is None and not layers:
        return {}
    if text is None:
        raise broken(Rule.EXITS, f"no metadata {EXITS_KEY!r} for exits {list(layers)}", "their calibration")
    values = parse_object(text, "the exits' calibration")
    if set(values) != {str(layer) for layer in layers}:
        raise broken(Rule.EXITS, f"calibration of {shown(list(values))}", f"of the exits {list(layers)}")
    return {layer: _calibration(layer, values[str(layer)]) for layer in layers}


def _calibration(layer: int, values: object) -> ExitCalibration:
    def wrong(what: str, expected: str) -> FormatError:
        return broken(Rule.EXITS, f"{what} for the exit after layer {layer}", expected)

    if not isinstance(values, Mapping) or values.keys() != _FIELDS:
        raise wrong(shown(values), f"an object with the keys {sorted(_FIELDS)}")
    temperature, bounds = values["temperature"], values["confidence"]
    if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
        raise wrong(f"temperature {shown(temperature)}", "a number from 0.001 to 1000")
    if not _is_list(bounds, (int, float)) or not 1 <= len(bounds) <= _MOST_BUCKETS:
        raise wrong(f"confidence {shown(bounds)}", f"1 to {_MOST_BUCKETS} numbers")
    if bounds[0] != 0 or any(not a < b < 1 for a, b in itertools.pairwise(bounds)):
        raise wrong(f"confidence {shown(bounds)}", "numbers from 0 up, ascending and below 1")
    tokens, agreed = values["tokens"], values["agreed"]
    for name, counts, most in (("tokens", tokens, [math.inf] * len(bounds)), ("agreed", agreed, tokens)):
        if not _is_list(counts, (int,)) or len(counts) != len(bounds):
            raise wrong(f"{name} {shown(counts)}", f"{len(bounds)} whole numbers")
        if any(not 0 <= count <= limit for count, limit in zip(counts, most, strict=True)):
            raise wrong(f"{name} {shown(counts)}", "numbers >= 0, of agreed no more than of tokens")
    if not any(tokens):
        raise wrong(f"tokens {shown(tokens)}", "at least one")
    return ExitCalibration(float(temperature), tuple(map(float, bounds)), tuple(tokens), tuple(agreed))


def _is_list(values: object, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(type(value) in kinds for value in values)
