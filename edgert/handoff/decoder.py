"""Answer from an exit when it is sure, else from the layers behind it: a decoder of the engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgert.decoding import Commit, Report, TokenSequence
from edgert.errors import LinkError
from edgert.handoff.rules import ExitRule, Logits
from edgert.handoff.thresholds import Threshold
from edgert.handoff.upper import Failure, Upper


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """When to answer from the last of some exits."""

    exits: tuple[int, ...]  # layers of the exits to look at, ascending
    temperatures: tuple[float, ...]  # of each
    rule: ExitRule
    threshold: Threshold

    @property
    def passed(self) -> tuple[int, ...]:
        """The exits whose logits are needed."""
        return self.exits if self.rule.every_exit else self.exits[-1:]

    def sure(self, found: Sequence[Logits]) -> bool:
        """Whether the logits [V] of the exits passed are good enough to answer from."""
        temperatures = self.temperatures[-len(found) :]
        scaled = [logits / np.float32(t) for logits, t in zip(found, temperatures, strict=True)]
        return self.rule.confidence(scaled) >= self.threshold.value()


class HandOff:
    """Runs the layers up to `layer` itself and leaves the rest to `upper`.

    policy: None where there are no exits; then every token is handed over. upper: None to answer from the
    exit always. clock: seconds.
    """

    def __init__(
        self,
        layer: int,
        policy: ExitPolicy | None,
        upper: Upper | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert policy is not None or upper is not None
        self._layer, self._policy, self._upper, self._clock = layer, policy, upper, clock
        self._counts = {"exits": 0, "handoffs": 0, "fallbacks": 0}

    def begin(self, sequence: TokenSequence) -> Report:
        """The upper part forgets what this sequence does not share with the one before."""
        self._counts = counts = dict.fromkeys(self._counts, 0)
        policy, upper = self._policy, self._upper
        if policy is not None:
            policy.threshold.begin()
        if upper is not None:
            upper.begin(sequence, sequence.forward.cache.length)

        def report() -> dict[str, Any]:
            thresholds = {} if policy is None else policy.threshold.report()
            return counts | thresholds | ({} if upper is None else upper.report())

        return report

    def prefill(self, sequence: TokenSequence) -> None:
        """A chunk of the prompt through the lower layers; its rows are on their way up."""
        self._run(sequence, sequence.forward.config.chunk, ())

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """One token: from the exit if it is sure or nothing else answers, from the upper part if not."""
        forward, policy, upper = sequence.forward, self._policy, self._upper
        if not sequence.pending:  # a step was interrupted behind its forward: the newest row once more
            forward.cache.rewind(forward.cache.length - 1)
        prompt, began = sequence.pending > 1, self._clock()
        exits = self._run(sequence, sequence.pending, () if policy is None else policy.passed)
        ran = self._clock()
        if upper is None or (policy is not None and policy.sure(exits)):
            self._counts["exits"] += 1
            self._time(prompt, ran - began, None)
            return sequence.commit([Commit(sequence.choose(exits[-1]), "exit")])
        found = upper.answer(sequence)
        self._time(prompt, ran - began, self._clock() - ran)
        if not isinstance(found, Failure):
            self._counts["handoffs"] += 1
            return sequence.commit([Commit(found, upper.source)])
        if not exits:
            raise LinkError(f"{found.text}; this file has no exit to answer from instead")
        self._counts["fallbacks"] += 1
        return sequence.commit([Commit(sequence.choose(exits[-1]), "exit", found.reason)])

    def _time(self, prompt: bool, lower_s: float, upper_s: float | None) -> None:
        """Tell the threshold what a token took; a step that ends a prompt says nothing of the next ones."""
        if self._policy is not None and not prompt:
            self._policy.threshold.took(lower_s, upper_s)

    def close(self) -> None:
        """Close the upper part."""
        if self._upper is not None:
            self._upper.close()

    def _run(self, sequence: TokenSequence, count: int, exits: Sequence[int]) -> list[Logits]:
        """The next `count` pending rows through the lower layers, and up.

        Gives the logits [V] of each of `exits` after the newest row.
        """
        forward = sequence.forward
        start = forward.cache.length
        rows = sequence.tokens[start : start + count]
        found: list[Logits] = []
        reached = 0
        try:
            for layer in exits:
                logits = forward.run(rows, outputs=[len(rows) - 1], layers=(reached, layer))
                found.append(logits[0].copy())
                reached = layer
            if reached < self._layer:
                forward.run(rows, layers=(reached, self._layer))
            if self._upper is not None:
                self._upper.push(start, rows, forward.hidden)
        except BaseException:  # an interrupt: the rows are pending still, in all layers
            forward.cache.rewind(start)
            raise
        return found
