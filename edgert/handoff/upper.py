"""The layers behind an exit: run later on the same board, or by a cloud half.

Every token's rows go to the upper part, whether or not its exit was sure; only some of them are asked
about. So the upper layers' keys and values are always exact: whoever is asked fills in all rows since the
last time, in a batch (EE-LLM, Chen et al., 2023, arXiv:2312.04916, section 4.2; CE-CoLLM, Jin and Wu,
2024, arXiv:2411.02829).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.decoding import TokenSequence
from edgert.events import Source
from edgert.sampling import Choice


class Failure(NamedTuple):
    """Why there is no answer."""

    reason: str  # one word, for the event: "deadline", "link" or "refused"
    text: str  # one line, for people


class Upper(Protocol):
    """Finishes what the lower layers began. It has the rows of one sequence at a time."""

    source: Source  # of the tokens it answers with

    def begin(self, sequence: TokenSequence, keep: int) -> None:
        """A sequence begins whose first `keep` rows are those of the one before."""

    def push(self, first: int, tokens: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """The rows from number `first` on, [T, D]. They may come a second time."""

    def answer(self, sequence: TokenSequence) -> Choice | Failure:
        """The token after all rows pushed."""

    def report(self) -> dict[str, Any]:
        """What happened since `begin`."""

    def close(self) -> None:
        """Give back what it holds."""


class LocalUpper:
    """The same model's upper layers, with rows deferred until a token is asked for."""

    source: Source = "model"

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._tokens: list[int] = []  # rows that the upper layers have not seen, from `_done` on
        self._hidden: list[NDArray[np.float32]] = []  # [D] each
        self._done = 0
        self._computed = 0

    def begin(self, sequence: TokenSequence, keep: int) -> None:
        """Forget the rows behind `keep`."""
        self._done = min(self._done, keep)
        self._cut(keep)
        self._computed = 0

    def push(self, first: int, tokens: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """Defer the rows; those that come again, after an interrupt, are done again."""
        self._cut(first)
        self._done = min(self._done, first)
        self._tokens += tokens
        self._hidden += [row.copy() for row in hidden]

    def answer(self, sequence: TokenSequence) -> Choice | Failure:
        """Run all deferred rows through the upper layers, then choose."""
        forward = sequence.forward
        total = self._done + len(self._tokens)
        logits = None
        while self._tokens:
            count = min(len(self._tokens), forward.config.chunk)
            last = [count - 1] if count == len(self._tokens) else []
            # The lower layers' keys and values of these rows stay where they are: only the length goes
            # back, and each chunk moves it on again.
            forward.cache.rewind(self._done)
            layers = self._layer, forward.spec.layers
            try:
                logits = forward.run(
                    self._tokens[:count], outputs=last, layers=layers, hidden=np.stack(self._hidden[:count])
                )
            finally:
                forward.cache.length = total  # also when a Ctrl-C struck: the lower layers are complete
            del self._tokens[:count], self._hidden[:count]
            self._done += count
            self._computed += count * (layers[1] - layers[0])
        assert logits is not None
        return sequence.choose(logits[0])

    def report(self) -> dict[str, Any]:
        """How much the exits saved."""
        return {"upper_layer_tokens": self._computed}

    def close(self) -> None:
        """Nothing is held."""

    def _cut(self, rows: int) -> None:
        kept = max(0, rows - self._done)
        del self._tokens[kept:], self._hidden[kept:]
