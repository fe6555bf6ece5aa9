"""What was measured, as it lies in the JSON file, and the figures derived from it."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

OURS = "edgert"
LLAMA_CPP = "llama.cpp"
ORT_GENAI = "onnxruntime-genai"

Unit = Literal["tokens", "bytes", "runs"]


@dataclass(frozen=True, slots=True)
class Timing:
    """One test of one group; every list has an entry for each round, in order."""

    key: str  # what the test is: pp, tg, tg_deep, gen, rows8, stream
    label: str  # the same for people, with its counts: pp512, tg64@d4096
    tokens: int  # computed in one run; 0 for a test that computes none
    nbytes: dict[str, int]  # of weights, or of the stream, that one run reads, by runtime
    seconds: dict[str, list[float]]  # of one run, by runtime

    def rates(self, runtime: str, unit: Unit) -> list[float]:
        """What was done per second, round by round."""
        amount = {"tokens": self.tokens, "bytes": self.nbytes.get(runtime, 0), "runs": 1}[unit]
        return [amount / seconds for seconds in self.seconds[runtime]]


@dataclass(frozen=True, slots=True)
class Group:
    """The tests of one model on one number of threads, interleaved with each other."""

    model: str
    threads: int
    idle_cpu: dict[str, float]  # cores that a runtime's process uses while it has nothing to do
    timings: list[Timing]

    def timing(self, key: str) -> Timing | None:
        """The test called `key`, if it was done."""
        return next((t for t in self.timings if t.key == key), None)


@dataclass(frozen=True, slots=True)
class Model:
    """One model, and how each runtime has it."""

    name: str
    role: Literal["shape", "small"]
    weights: str  # where they come from, for people
    parameters: int  # in matrices
    weight_bytes: dict[str, int]  # by runtime, as each counts them
    agreement: float | None  # least correlation of edgert's and llama.cpp's logits, where weights are one


@dataclass(frozen=True, slots=True)
class Results:
    """A whole run."""

    date: str
    command: str
    rounds: int
    machine: dict[str, Any]
    versions: dict[str, str]
    models: list[Model]
    groups: list[Group]

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The inverse of `write`."""
        values = json.loads(path.read_text())
        for group in values["groups"]:
            group["timings"] = [Timing(**timing) for timing in group["timings"]]
        values["groups"] = [Group(**group) for group in values["groups"]]
        values["models"] = [Model(**model) for model in values["models"]]
        return cls(**values)


class Spread(NamedTuple):
    """Of the rounds."""

    median: float
    least: float
    most: float


def spread(values: list[float]) -> Spread:
    """Median, minimum and maximum."""
    return Spread(statistics.median(values), min(values), max(values))


def quotients(over: list[float], under: list[float]) -> Spread:
    """Of two lists of rates, round by round: what a drifting machine does to both cancels out."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
