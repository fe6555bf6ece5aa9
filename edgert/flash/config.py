"""How weights are streamed, and what may be approximated for its sake."""

from dataclasses import dataclass
from typing import Literal

from edgert.errors import OptionError

PolicyName = Literal["lru", "frequency", "score"]
POLICIES: tuple[PolicyName, ...] = ("lru", "frequency", "score")
PredictorName = Literal["router", "history", "none"]
PREDICTORS: tuple[PredictorName, ...] = ("router", "history", "none")
Prefetch = Literal["auto", "on"]
MOST_READERS = 16
"""Reads in flight: more than any flash of a small computer gains by."""


@dataclass(frozen=True, slots=True)
class Streaming:
    """Choices of a store (docs/experts.md; `tools/bench_experts.py` times each).

    Only the fields under "approximations" change what a model says, and they do so only where they are
    set: which experts are in memory then decides on the text.
    """

    policy: PolicyName = "lru"  # what is evicted, see policy.py
    predictor: PredictorName = "router"  # how the next layer's experts are guessed, see predict.py
    prefetch: Prefetch = "auto"  # "on" reads guesses ahead always, "auto" only while that pays
    overlap: bool = True  # False: nothing is computed before all experts of a layer are there
    pinned: float = 0.0  # share of the slots for the most used experts of the file's calibration
    verify: bool = False  # compare each expert's SHA-256 when it is first read
    readers: int = 0  # reads in flight; 0: as many as were measured to pay while the model was loaded
    # Approximations.
    swap_near: float = 0.0  # a missing expert gives way to one in memory with 1 - this of its probability
    drop_below: float = 0.0  # a missing expert with less than this share of a token's weight is left out
    stand_in_below: float = 0.0  # one with no more than this share is read from `stand_ins`
    stand_ins: str = ""  # an .ert file of the same model in fewer bits

    def __post_init__(self) -> None:
        checks = (
            ("policy", self.policy in POLICIES, f"one of {', '.join(POLICIES)}"),
            ("predictor", self.predictor in PREDICTORS, f"one of {', '.join(PREDICTORS)}"),
            ("prefetch", self.prefetch in ("auto", "on"), "auto or on"),
            ("pinned", 0 <= self.pinned < 1, "a share from 0 to below 1"),
            ("readers", self.readers in range(MOST_READERS + 1), f"0 (measured) or 1 to {MOST_READERS}"),
            ("swap_near", 0 <= self.swap_near < 1, "a share from 0 to below 1"),
            ("drop_below", 0 <= self.drop_below < 1, "a share from 0 to below 1"),
            ("stand_in_below", 0 <= self.stand_in_below <= 1, "a share from 0 to 1"),
            ("stand_ins", bool(self.stand_ins) == (self.stand_in_below > 0), "a file, with stand_in_below"),
        )
        for name, good, expected in checks:
            if not good:
                raise OptionError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def spared(self) -> tuple[float, float, float]:
        """`near`, `least` and `below` of kernels/sparing.py, as shares."""
        return self.swap_near, self.drop_below, self.stand_in_below

    @property
    def exact(self) -> bool:
        """Whether the output is that of the model in memory, bit for bit."""
        return not any(self.spared)
