"""The engine: one sequence, advanced step by step. step() is schedule, run, commit."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.config import EngineConfig
from edgert.errors import ContextLengthError
from edgert.model.forward import Forward
from edgert.sampling import Choice, Sampler
from edgert.state import MAX_OUTPUTS, Weights


class Engine:
    """Runs one model over one token sequence.

    `tokens` is the whole sequence, prompt and generated; the cache holds the keys and values of its
    first `forward.cache.length`. What is not cached yet is pending.
    """

    def __init__(self, weights: Weights, config: EngineConfig) -> None:
        self.forward = Forward(weights, config)
        self.tokens: list[int] = []
        self._prompt: list[int] = []
        self._sampler: Sampler | None = None

    def close(self) -> None:
        """End the threads."""
        self.forward.close()

    def start(self, prompt: Sequence[int], sampler: Sampler) -> int:
        """Begin a sequence; gives how many tokens of it were cached by the one before.

        Raises ContextLengthError if the prompt leaves no room for one more token.
        """
        room = self.forward.cache.limit - 1
        if len(prompt) > room:  # before anything is changed: the sequence in progress stays usable
            larger, own = "", self.forward.spec.context
            if own > room + 1:
                larger = f", or load with a larger context (this model's own is {own})"
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, expected at most {room} in a context of {room + 1}; "
                f"shorten it{larger}"
            )
        # The last token must be computed in any case: its logits are what is wanted.
        shared = _common_prefix(self.tokens[: self.forward.cache.length], prompt[:-1])
        self.forward.cache.rewind(shared)
        self.tokens = list(prompt)
        self._prompt, self._sampler = self.tokens[:], sampler
        return shared

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet."""
        return len(self.tokens) - self.forward.cache.length

    @property
    def full(self) -> bool:
        """Whether the context has no room for the pending tokens."""
        return len(self.tokens) > self.forward.cache.limit

    def step(self) -> Choice | None:
        """Compute the next chunk of pending tokens; the token chosen after the last of them, or None."""
        chunk, complete = self._schedule()
        logits = self.forward.run(chunk, outputs=[len(chunk) - 1] if complete else [])
        return self._commit(logits[0]) if complete else None

    def _schedule(self) -> tuple[list[int], bool]:
        start = self.forward.cache.length
        chunk = self.tokens[start : start + self.forward.config.chunk]
        return chunk, start + len(chunk) == len(self.tokens)

    def _commit(self, logits: NDArray[np.float32]) -> Choice:
        assert self._sampler is not None
        generated = self.tokens[len(self._prompt) :]
        choice = self._sampler.choose(logits, self._prompt, generated)
        self.tokens.append(choice.token)
        return choice

    def logits(self, tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Logits after each token, from an empty cache: float32 [rows, V] pieces of up to MAX_OUTPUTS.

        A piece is a view, valid until the next: a whole text's logits can be larger than the model.
        """
        forward = self.forward
        self.tokens = []
        forward.cache.rewind(0)
        forward.cache.room_for(len(tokens))
        size = min(forward.config.chunk, MAX_OUTPUTS)
        for start in range(0, len(tokens), size):
            rows = tokens[start : start + size]
            yield forward.run(rows, outputs=range(len(rows)))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
