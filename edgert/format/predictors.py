"""What a file's predictors of firing neurons were measured to be worth."""

import math
from dataclasses import dataclass
from typing import Any, Final

from edgert.format.header import parse_object
from edgert.format.rules import Rule, broken, shown

PREDICTORS_KEY: Final = "predictors"  # of __metadata__
_SHARES: Final = ("recall", "predicted", "firing")
_MOST_PERPLEXITY: Final = 1e30


@dataclass(frozen=True, slots=True)
class Predictors:
    """Counted on text that they were not trained on; shares per layer, 0 for a layer without a predictor."""

    perplexity: tuple[float, float]  # of the model they were trained on: whole, and with what they miss
    recall: tuple[float, ...]  # of the neurons that fire, how many were predicted
    predicted: tuple[float, ...]  # of all neurons
    firing: tuple[float, ...]  # of all neurons

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: getattr(self, name) for name in ("perplexity", *_SHARES)}

    @property
    def cost(self) -> str:
        """One line for people: what they change."""
        whole, predicted = self.perplexity
        return f"perplexity on held-out text {whole:.3f} -> {predicted:.3f} ({predicted / whole - 1:+.2%})"


def read_predictors(text: str | None, ranks: tuple[int, ...]) -> Predictors | None:
    """From the metadata string; FormatError (F33) unless it is there exactly where `ranks` are."""
    if text is None and not ranks:
        return None
    if text is None or not ranks:
        found = "no metadata" if text is None else "metadata"
        raise broken(
            Rule.PREDICTORS, f"{found} {PREDICTORS_KEY!r} for predictors {list(ranks)}", "both or none"
        )
    values = parse_object(text, "the predictors' calibration")
    if set(values) != {"perplexity", *_SHARES}:
        raise broken(Rule.PREDICTORS, f"the keys {shown(list(values))}", f"{['perplexity', *_SHARES]}")
    perplexity = values["perplexity"]
    if not _are_numbers(perplexity, 2, 1, _MOST_PERPLEXITY):
        raise broken(Rule.PREDICTORS, f"perplexity {shown(perplexity)}", "two numbers >= 1")
    for name in _SHARES:
        if not _are_numbers(values[name], len(ranks), 0, 1):
            raise broken(
                Rule.PREDICTORS, f"{name} {shown(values[name])}", f"{len(ranks)} numbers from 0 to 1"
            )
    shares = (tuple(map(float, values[name])) for name in _SHARES)
    return Predictors((float(perplexity[0]), float(perplexity[1])), *shares)


def _are_numbers(values: object, count: int, least: float, most: float) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(v) in (int, float) and math.isfinite(v) and least <= v <= most for v in values)
