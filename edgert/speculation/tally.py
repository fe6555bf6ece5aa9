"""What speculation did in one sequence."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Tally:
    """Counts of one sequence."""

    steps: int = 0  # that checked guesses
    committed: int = 0  # tokens of those steps, the target's own included
    fallback_steps: int = 0  # plain steps: nothing was guessed that would have paid
    drafted: int = 0  # guesses grown
    verified: int = 0  # guesses checked
    taken: dict[str, int] = field(default_factory=dict)  # guesses that came true, by drafter
    draft_s: float = 0.0
    verify_s: float = 0.0

    def count(self, tokens: int, drafted: int, verified: int, draft_s: float, verify_s: float) -> None:
        """One step more."""
        self.drafted += drafted
        self.draft_s += draft_s
        if not verified:
            self.fallback_steps += 1
            return
        self.steps += 1
        self.committed += tokens
        self.verified += verified
        self.verify_s += verify_s

    def report(self) -> dict[str, Any]:
        """The statistics under their public names.

        accepted_per_step: tokens that one verification gave, the target's own one included (EAGLE's
        average acceptance length); 1 is what plain decoding gives.
        """
        return {
            "accepted_per_step": self.committed / self.steps if self.steps else 1.0,
            "drafted": self.drafted,
            "verified": self.verified,
            "verifications": self.steps,
            "fallback_steps": self.fallback_steps,
            "taken": dict(self.taken),
            "draft_s": self.draft_s,
            "verify_s": self.verify_s,
        }
