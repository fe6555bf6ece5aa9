"""What the rules' confidences are worth, counted on text.

Those of the largest probability are in every file with exits (docs/format.md). The other rules have
counts of the same kind in the metadata `exit_rules`: {"margin": {"4": {...}}}.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.errors import OptionError
from edgert.format import ErtFile, ExitCalibration
from edgert.format.exits import EXITS_KEY, read_exits
from edgert.format.header import parse_object
from edgert.handoff.rules import RULES, ExitRule, Logits, RuleName
from edgert.model.forward import Forward
from edgert.state import MAX_OUTPUTS

RULES_KEY: Final = "exit_rules"  # of __metadata__
_BUCKETS: Final = 100
"""Of equally many tokens each: thresholds for a wanted agreement then differ by a hundredth of the tokens."""


def calibration_of(file: ErtFile, rule: ExitRule, layer: int) -> ExitCalibration:
    """The counts of one rule at one exit; OptionError where the file has none."""
    if rule.name == "top":
        return file.exits[layer]
    found = parse_object(file.metadata.get(RULES_KEY, "{}"), "the exit rules' calibration")
    if rule.name not in found:
        raise OptionError(
            f"{file.path} was not calibrated for the exit rule {rule.name}; do that: "
            f"edgert calibrate {file.path} --text FILE"
        )
    return read_exits(json.dumps(found[rule.name]), file.spec.exits)[layer]


@dataclass
class _Tally:
    """Of one rule at one exit: each token's confidence, and whether the exit chose as the whole model."""

    confidence: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)

    def counts(self, temperature: float) -> ExitCalibration:
        """In buckets of equally many tokens."""
        confidence, agreed = np.array(self.confidence), np.array(self.agreed)
        inner = np.quantile(confidence, np.arange(1, _BUCKETS) / _BUCKETS, method="lower")
        bounds = [0.0, *sorted({float(b) for b in inner if 0 < b < 1})]
        bucket = np.searchsorted(bounds, confidence, side="right") - 1
        tokens = np.bincount(bucket, minlength=len(bounds))
        right = np.bincount(bucket, weights=agreed, minlength=len(bounds)).astype(int)
        return ExitCalibration(temperature, tuple(bounds), tuple(map(int, tokens)), tuple(map(int, right)))


def calibrate(
    forward: Forward, temperatures: dict[int, float], documents: Iterable[Sequence[int]]
) -> dict[RuleName, dict[int, ExitCalibration]]:
    """Count all rules at all exits of a whole model, on documents of token ids.

    temperatures: of each exit. A document longer than the context is cut. Raises OptionError without a
    single token.
    """
    exits = forward.spec.exits
    tallies = {(name, layer): _Tally() for name in RULES for layer in exits}
    for document in documents:
        forward.cache.rewind(0)
        tokens = list(document)[: forward.cache.limit]
        step = min(MAX_OUTPUTS, forward.config.chunk)
        for start in range(0, len(tokens), step):
            _count(forward, temperatures, tokens[start : start + step], tallies)
    if not exits or not next(iter(tallies.values())).confidence:
        raise OptionError("found nothing to calibrate; expected a model with exits and a text with tokens")
    return {name: {k: tallies[name, k].counts(temperatures[k]) for k in exits} for name in RULES}


def _count(
    forward: Forward,
    temperatures: dict[int, float],
    rows: list[int],
    tallies: dict[tuple[RuleName, int], _Tally],
) -> None:
    """Add one pass's rows to the tallies."""
    reached, wanted = 0, range(len(rows))
    found: dict[int, NDArray[np.float32]] = {}
    for layer in (*forward.spec.exits, forward.spec.layers):
        found[layer] = forward.run(rows, outputs=wanted, layers=(reached, layer)).copy()
        reached = layer
    for row in wanted:
        target = int(found[reached][row].argmax())
        passed: list[Logits] = []
        for layer in forward.spec.exits:
            passed.append(found[layer][row] / np.float32(temperatures[layer]))
            agreed = int(passed[-1].argmax()) == target
            for name, rule in RULES.items():
                tallies[name, layer].confidence.append(rule.confidence(passed))
                tallies[name, layer].agreed.append(agreed)


def as_metadata(found: dict[RuleName, dict[int, ExitCalibration]]) -> dict[str, str]:
    """The counts as the metadata of a file."""

    def plain(exits: dict[int, ExitCalibration]) -> dict[str, object]:
        return {str(layer): counts.to_json() for layer, counts in exits.items()}

    rules = {name: plain(exits) for name, exits in found.items() if name != "top"}
    return {EXITS_KEY: json.dumps(plain(found["top"])), RULES_KEY: json.dumps(rules)}
