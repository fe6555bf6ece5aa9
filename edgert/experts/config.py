"""How experts are streamed. Nothing here changes a bit of the output."""

from dataclasses import dataclass
from typing import Literal

from edgert.errors import OptionError

PolicyName = Literal["lru", "frequency", "score"]
POLICIES: tuple[PolicyName, ...] = ("lru", "frequency", "score")
PredictorName = Literal["router", "history", "none"]
PREDICTORS: tuple[PredictorName, ...] = ("router", "history", "none")
Prefetch = Literal["auto", "on"]


@dataclass(frozen=True, slots=True)
class Streaming:
    """Choices of an ExpertStore (docs/experts.md; `tools/bench_experts.py` times each)."""

    policy: PolicyName = "lru"  # what is evicted, see policy.py
    predictor: PredictorName = "router"  # how the next layer's experts are guessed, see predict.py
    prefetch: Prefetch = "auto"  # "on" reads guesses ahead always, "auto" only while that pays
    overlap: bool = True  # False: nothing is computed before all experts of a layer are there
    pinned: float = 0.0  # share of the slots for the most used experts of the file's calibration
    verify: bool = False  # compare each expert's SHA-256 when it is first read

    def __post_init__(self) -> None:
        checks = (
            ("policy", self.policy in POLICIES, f"one of {', '.join(POLICIES)}"),
            ("predictor", self.predictor in PREDICTORS, f"one of {', '.join(PREDICTORS)}"),
            ("prefetch", self.prefetch in ("auto", "on"), "auto or on"),
            ("pinned", 0 <= self.pinned < 1, "a share from 0 to below 1"),
        )
        for name, good, expected in checks:
            if not good:
                raise OptionError(f"{name} is {getattr(self, name)!r}; expected {expected}")
