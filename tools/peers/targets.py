"""What edgert is to reach, each as the quotient of two rates measured in the same rounds."""

from dataclasses import dataclass
from typing import Literal

from .results import LLAMA_CPP, OURS, Results, Spread, Unit, quotients


@dataclass(frozen=True, slots=True)
class Target:
    """Rate of `over` divided by rate of `under`, each a runtime and a test, and its bound."""

    label: str
    role: Literal["shape", "small"]  # of the model
    threads: int
    over: tuple[str, str]
    under: tuple[str, str]
    unit: Unit
    bound: float
    at_most: bool = False

    def measured(self, results: Results) -> Spread | None:
        """The quotient, or None where the run did not measure both."""
        names = {model.name for model in results.models if model.role == self.role}
        for group in results.groups:
            if group.model not in names or group.threads != self.threads:
                continue
            over, under = group.timing(self.over[1]), group.timing(self.under[1])
            if over and under and self.over[0] in over.seconds and self.under[0] in under.seconds:
                return quotients(over.rates(self.over[0], self.unit), under.rates(self.under[0], self.unit))
        return None

    def met(self, value: float) -> bool:
        """Whether `value` is on the right side of the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


def _faster(label: str, role: Literal["shape", "small"], threads: int, key: str, bound: float) -> Target:
    """At least `bound` times llama.cpp's speed."""
    return Target(label, role, threads, (OURS, key), (LLAMA_CPP, key), "tokens", bound)


def _streams(threads: int) -> Target:
    label = "generation over streaming bandwidth"
    return Target(label, "shape", threads, (OURS, "tg"), (OURS, "stream"), "bytes", 0.85)


def _rows(count: int, bound: float) -> Target:
    label = f"a forward of {count} rows over one of 1"
    return Target(label, "shape", 1, (OURS, "rows1"), (OURS, f"rows{count}"), "runs", bound, at_most=True)


TARGETS = (
    _faster("generation", "shape", 1, "tg", 1.7),
    _faster("generation", "shape", 2, "tg", 1.3),
    _streams(1),
    _streams(2),
    _faster("prompt processing", "shape", 1, "pp", 2.0),
    _faster("prompt processing", "shape", 2, "pp", 2.0),
    _faster("generation, deep in the context", "shape", 2, "tg_deep", 1.3),
    _rows(4, 1.25),
    _rows(8, 1.6),
    _faster("small model, generation, forward only", "small", 1, "tg", 1.0),
    _faster("small model, generation, forward only", "small", 2, "tg", 1.0),
    _faster("small model, generation with greedy sampling", "small", 1, "gen", 1.0),
    _faster("small model, generation with greedy sampling", "small", 2, "gen", 1.0),
)
