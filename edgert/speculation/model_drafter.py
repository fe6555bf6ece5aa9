"""A draft model: a small model with the target's tokenizer, its own weights and its own cache."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.decoding import TokenSequence, common_prefix
from edgert.model.forward import Forward
from edgert.speculation.forward_drafter import ForwardDrafter
from edgert.speculation.online import HeadCorrection

SHORT_MEMORY = 64
"""Tokens a draft begins with after a pause longer than that: enough to guess from, and cheap to compute.
All that it missed would cost up to a twentieth of what plain decoding took meanwhile."""

_AT_ONCE = 4
"""Missing tokens that are computed in one forward with the newest: one or two after most steps."""


def _nothing() -> None:
    """What is released where the draft's weights belong to someone else."""


class ModelDrafter(ForwardDrafter):
    """Its cache holds the sequence's tokens from `_start` on, as far as they were accepted or prompted."""

    def __init__(
        self, forward: Forward, vocab: int, *, learn: bool = False, release: Callable[[], None] = _nothing
    ) -> None:
        correction = HeadCorrection(forward.spec.width) if learn else None
        super().__init__("model", min(vocab, forward.spec.vocab), correction)
        self._forward = forward
        self._release = release  # of the draft's file, once its threads have ended
        self._held: Sequence[int] = []  # the tokens whose keys and values it has, and what follows
        self._start = 0
        self._prompted = False  # whether the prompt was computed: what is missing then was paused over

    def begin(self, sequence: TokenSequence) -> None:
        """Keep what the new prompt shares with what is cached."""
        super().begin(sequence)
        cache = self._forward.cache
        held = self._held[self._start : self._start + cache.length]
        shared = common_prefix(held, sequence.tokens[:-1]) if self._start == 0 else 0
        cache.rewind(shared)
        self._held, self._start, self._prompted = sequence.tokens, 0, False

    def close(self) -> None:
        """End the draft's threads and give its file back."""
        self._forward.close()
        self._release()

    def _room(self) -> int:
        cache = self._forward.cache
        return cache.limit - cache.length - self._count

    def _catch_up(self, sequence: TokenSequence) -> float:
        """Compute the prompt, or what passed while it rested; all but the last tokens of it."""
        forward, tokens = self._forward, sequence.tokens
        missing = len(tokens) - self._start - forward.cache.length
        if missing <= _AT_ONCE and missing <= self._room():
            return 0.0
        began = time.perf_counter()
        if (self._prompted and missing > SHORT_MEMORY) or missing > self._room():
            self._start = max(0, len(tokens) - min(SHORT_MEMORY, forward.cache.limit // 2))
            forward.cache.rewind(0)
        self._prompted = True
        rest = tokens[self._start + forward.cache.length : -1]
        for at in range(0, len(rest), forward.config.chunk):
            forward.run(rest[at : at + forward.config.chunk])
        return time.perf_counter() - began

    def _run_root(self, sequence: TokenSequence) -> NDArray[np.float32]:
        began = time.perf_counter()
        pending = sequence.tokens[self._start + self._forward.cache.length :]
        logits: NDArray[np.float32] = self._forward.run(pending, outputs=[len(pending) - 1])[0]
        self.cost.observe(len(pending), time.perf_counter() - began)
        return logits

    def _run_rows(self, tokens: list[int], parents: list[int], behind: int) -> NDArray[np.float32]:
        return self._forward.run(tokens, parents=parents, behind=behind, outputs=range(len(tokens)))

    def _features(self, count: int) -> NDArray[np.float32]:
        return self._forward.chosen(count)

    def _keep(self, rows: list[int]) -> None:
        self._forward.keep(rows)
