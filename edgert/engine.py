"""The engine: one sequence, advanced step by step, by whatever decoder it was given."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.config import EngineConfig
from edgert.decoding import Commit, Decoder, Plain, Report, TokenSequence
from edgert.flash import Store
from edgert.model.forward import Forward
from edgert.sampling import Sampler
from edgert.state import MAX_OUTPUTS, Weights


class Engine:
    """Runs one model over one token sequence: the prompt chunk by chunk, then the decoder's steps."""

    def __init__(
        self,
        weights: Weights,
        config: EngineConfig,
        decoder: Decoder | None = None,
        store: Store | None = None,
    ) -> None:
        self.forward = Forward(weights, config, store)
        self.sequence = TokenSequence(self.forward)
        self.decoder: Decoder = decoder or Plain()
        self.report: Report = dict  # what the decoder has to say of the sequence in progress

    def close(self) -> None:
        """End the threads."""
        self.decoder.close()
        self.forward.close()

    def start(self, prompt: Sequence[int], sampler: Sampler) -> int:
        """Begin a sequence; gives how many tokens of it were cached by the one before.

        Raises ContextLengthError if the prompt leaves no room for one more token.
        """
        shared = self.sequence.begin(prompt, sampler)
        self.report = self.decoder.begin(self.sequence)
        return min(shared, self.forward.cache.length)  # a decoder may have no use for some of them

    def step(self) -> list[Commit]:
        """Compute one more chunk of the prompt, or let the decoder advance; the tokens committed."""
        if self.sequence.pending > self.forward.config.chunk:
            self.decoder.prefill(self.sequence)
            return []
        return self.decoder.step(self.sequence)

    def logits(self, tokens: Sequence[int], prompt: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Logits after each token, from an empty cache: float32 [rows, V] pieces of up to MAX_OUTPUTS.

        prompt: how many of them are the prompt; None for all. A piece is a view, valid until the next: a
        whole text's logits can be larger than the model.
        """
        forward = self.forward
        self.sequence.clear()
        forward.cache.room_for(len(tokens))
        size = min(forward.config.chunk, MAX_OUTPUTS)
        for part in (tokens,) if prompt is None else (tokens[:prompt], tokens[prompt:]):
            for start in range(0, len(part), size):
                rows = part[start : start + size]
                yield forward.run(rows, outputs=range(len(rows)))
            forward.freeze()
