"""Feed-forwards that are left out, where the hidden rows hardly change in them.

FFN-SkipLLM (Jaiswal et al., 2024, arXiv:2404.03865): in the middle of a deep model the rows before and after
a feed-forward point the same way. There the cosine decides for each token; here for a layer, on a text, so
that nothing has to be computed to know it. The first and the last layer remain, as do the first positions.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import DOWN, LEFT_OUT, EngineConfig
from edgert.errors import OptionError
from edgert.format.inputs import PLACES, InputThresholds
from edgert.model.forward import WHOLE_AT_START, Forward
from edgert.state import Weights

SATURATED: Final = 0.99
"""Cosine of the rows before and after a feed-forward from which it may be left out: a seventh of a row's
length goes with it there. At 0.98 three more layers of docs/sparsity.md's model went, for 5% to 15% each."""


def find_skips(
    weights: Weights, config: EngineConfig, windows: Sequence[Sequence[int]], share: float
) -> InputThresholds:
    """Thresholds that leave out up to `share` of the feed-forwards: those with the largest cosine.

    Raises OptionError where none saturates; windows of token ids, each of one chunk at most.
    """
    spec = weights.spec
    found = cosines(weights, config, windows)
    middle = range(1, spec.layers - 1)
    ready = sorted((layer for layer in middle if found[layer] >= SATURATED), key=lambda layer: -found[layer])
    chosen = set(ready[: max(1, int(share * spec.layers))])
    if not chosen:
        most = max((found[layer] for layer in middle), default=0.0)
        raise OptionError(
            f"sparsity is skip:{share}, but no feed-forward between the first and the last layer hardly "
            f"changes its rows: cosines up to {most:.3f}, expected {SATURATED}; use another sparsity"
        )
    none, all_of = (0.0,) * PLACES, tuple(float(place == DOWN) for place in range(PLACES))
    thresholds = tuple(
        tuple(LEFT_OUT * level for level in all_of) if layer in chosen else none
        for layer in range(spec.layers)
    )
    zeros = tuple(all_of if layer in chosen else none for layer in range(spec.layers))
    return InputThresholds(share, thresholds, zeros)


def cosines(weights: Weights, config: EngineConfig, windows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Of the rows before and after each feed-forward, the mean over a text: [L]."""
    layers = weights.spec.layers
    sums, rows = np.zeros(layers), 0
    before: list[NDArray[np.float64]] = [np.zeros((0, 0))] * layers
    with closing(Forward(weights, replace(config, inputs=()))) as forward:

        def keep(layer: int, count: int) -> None:
            before[layer] = forward.hidden[WHOLE_AT_START:].astype(np.float64)

        for layer, (start, _) in forward.feed_forwards.items():
            forward.watch[start] = partial(keep, layer)
        for tokens in windows:
            forward.cache.length = 0
            hidden = forward.run(tokens, layers=(0, 0)).copy()
            forward.cache.length = 0
            for layer in range(layers):
                forward.cache.length = 0
                hidden = forward.run(tokens, layers=(layer, layer + 1), hidden=hidden).copy()
                after = hidden[WHOLE_AT_START:].astype(np.float64)
                lengths = np.linalg.norm(before[layer], axis=1) * np.linalg.norm(after, axis=1)
                sums[layer] += ((before[layer] * after).sum(axis=1) / np.maximum(lengths, 1e-30)).sum()
            rows += max(0, len(tokens) - WHOLE_AT_START)
    return sums / max(rows, 1)
