"""How the next tokens of a sequence come about: the seam between the engine and its accelerations.

The engine computes the prompt; a `Decoder` takes it from there. Plain decoding, speculation, early
exits and the hand-off to a cloud are decoders: each advances the same `TokenSequence` by whole steps
and gives what it committed, token by token, with its source. The loop around them exists once, in
`runtime.Generation`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.config import SamplingParams
from edgert.errors import ContextLengthError
from edgert.events import Source
from edgert.model.forward import Forward
from edgert.sampling import Choice, Sampler


class Commit(NamedTuple):
    """One token that is now part of the sequence, and who produced it."""

    choice: Choice
    source: Source
    fallback: str = ""  # why it is not from where it was asked for, as `TokenEvent.fallback`


class TokenSequence:
    """One sequence and the forward path that computes it.

    `tokens` is all of it, prompt and generated; the cache holds the keys and values of its first
    `forward.cache.length`. What is not cached yet is pending: in plain decoding the newest token.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.tokens: list[int] = []
        self.prompt: list[int] = []
        self.sampler = Sampler(SamplingParams(), forward.spec.vocab)

    def begin(self, prompt: Sequence[int], sampler: Sampler) -> int:
        """Start anew with a prompt; gives how many tokens of it are cached from before.

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
        shared = common_prefix(self.tokens[: self.forward.cache.length], prompt[:-1])
        shared = self.forward.resume(shared)
        self.tokens = list(prompt)
        self.prompt, self.sampler = self.tokens[:], sampler
        return shared

    def clear(self) -> None:
        """Forget all tokens, and their keys and values."""
        self.tokens, self.prompt = [], []
        self.forward.cache.rewind(0)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet."""
        return len(self.tokens) - self.forward.cache.length

    @property
    def prompting(self) -> bool:
        """Whether the prompt is not computed yet, or not all of it."""
        return len(self.tokens) == len(self.prompt) and self.pending > 0

    @property
    def full(self) -> bool:
        """Whether the context has no room for the pending tokens."""
        return len(self.tokens) > self.forward.cache.limit

    @property
    def wanted(self) -> int:
        """How many more tokens the sampling parameters ask for."""
        return self.sampler.params.max_tokens - (len(self.tokens) - len(self.prompt))

    def run_pending(self) -> NDArray[np.float32] | None:
        """Compute the next chunk of pending tokens; logits [V] after the last of them, else None.

        With them the prompt is through, whatever follows.
        """
        start = self.forward.cache.length
        chunk = self.tokens[start : start + self.forward.config.chunk]
        complete = start + len(chunk) == len(self.tokens)
        logits = self.forward.run(chunk, outputs=[len(chunk) - 1] if complete else [])
        if not complete:
            return None
        self.forward.freeze()
        last: NDArray[np.float32] = logits[0]
        return last

    def choose(self, logits: NDArray[np.float32], path: Sequence[int] = ()) -> Choice:
        """The token that follows the sequence, or the sequence and `path`, given its logits [V]."""
        generated = self.tokens[len(self.prompt) :]
        return self.sampler.choose(logits, self.prompt, [*generated, *path] if path else generated)

    def commit(self, commits: list[Commit]) -> list[Commit]:
        """Append tokens; gives them back, for a step to return."""
        self.tokens.extend(commit.choice.token for commit in commits)
        return commits


Report = Callable[[], dict[str, Any]]
"""Says at any time what happened to one sequence so far: JSON values under stable names, for people."""


class Decoder(Protocol):
    """One way to advance a sequence. It lives as long as the engine, over many sequences."""

    def begin(self, sequence: TokenSequence) -> Report:
        """A new sequence has begun; its prompt is not computed yet, or only in part."""

    def prefill(self, sequence: TokenSequence) -> None:
        """Compute a chunk of a prompt of which more than that is pending."""

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """Advance by one step and give what was committed: at least one token.

        At most `config.chunk` tokens are pending, and the context has room for them. Tokens past
        the end of an answer (`wanted`, an end token) are harmless: nobody reads them.
        """

    def close(self) -> None:
        """Give back what it holds (a draft's threads)."""


class Plain:
    """One token per forward."""

    def begin(self, sequence: TokenSequence) -> Report:
        """Nothing to prepare, nothing to tell."""
        return dict

    def prefill(self, sequence: TokenSequence) -> None:
        """The next chunk."""
        sequence.run_pending()

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """Compute what is pending and choose the token after it."""
        logits = sequence.run_pending()
        assert logits is not None
        return sequence.commit([Commit(sequence.choose(logits), "model")])

    def close(self) -> None:
        """Nothing is held."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
