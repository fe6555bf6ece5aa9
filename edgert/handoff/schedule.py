"""Fewer layers the further a text goes on: a decoder whose exits fall with the position.

SkipDecode (Del Corro et al., 2023, arXiv:2307.02628): a token leaves at a layer that depends on its place
alone and never rises. So a later token needs keys and values only of layers that every earlier one
computed: there is nothing to defer and nothing to fill in, and the time of each token is known in advance.
It does not look at how sure an exit is; how much text it costs is for the user to measure.
"""

from collections.abc import Sequence

from edgert.decoding import Commit, Report, TokenSequence


class Scheduled:
    """From all layers for the prompt and the first token down to the first of `levels` for the last.

    levels: exits and, last, the number of layers; ascending.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self._levels = tuple(levels)
        self._full = 0  # rows of the cache that have all layers
        self._counts: dict[str, int] = {}

    def level(self, place: int, wanted: int) -> int:
        """The layers computed for generated token `place` of `wanted`; never more than for the one before."""
        levels = self._levels
        return levels[len(levels) - 1 - place * len(levels) // max(1, wanted)]

    def begin(self, sequence: TokenSequence) -> Report:
        """Rows of the sequence before that left early are computed again: this one needs all of them."""
        cache = sequence.forward.cache
        cache.rewind(min(self._full, cache.length))
        self._full = cache.length
        self._counts = counts = {"exits": 0, "layer_tokens": 0}
        return lambda: dict(counts)

    def prefill(self, sequence: TokenSequence) -> None:
        """The prompt goes through all layers."""
        sequence.run_pending()
        rows = sequence.forward.cache.length - self._full
        self._full += rows
        self._counts["layer_tokens"] += rows * self._levels[-1]

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """One token from the layer whose turn it is."""
        forward, layers = sequence.forward, self._levels[-1]
        if not sequence.pending:  # a step was interrupted behind its forward: the newest row once more
            forward.cache.rewind(forward.cache.length - 1)
        place = len(sequence.tokens) - len(sequence.prompt)
        level = layers if place == 0 else self.level(place, sequence.sampler.params.max_tokens)
        rows = sequence.tokens[forward.cache.length :]
        logits = forward.run(rows, outputs=[len(rows) - 1], layers=(0, level))
        if level == layers:
            self._full = forward.cache.length
        self._counts["exits"] += level < layers
        self._counts["layer_tokens"] += level * len(rows)
        return sequence.commit([Commit(sequence.choose(logits[0]), "model" if level == layers else "exit")])

    def close(self) -> None:
        """Nothing is held."""
