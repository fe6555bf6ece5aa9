"""A text on its way through a model, one layer at a time, with observers looking at what each matrix meets.

All rows of the text go through a layer before any goes through the next: so statistics that are large (a
Gram matrix of every input of a layer) have to be held for one layer only. What waits in between is one
hidden row per token.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.calibration.taps import Tap, find_taps, rows_at
from edgert.model.forward import Forward
from edgert.state import MAX_OUTPUTS, Weights


class Observer(Protocol):
    """A statistic in the making. Another one is another class with this method, given to `Walk.layer`."""

    def see(self, names: tuple[str, ...], rows: NDArray[np.float32]) -> None:
        """rows [R, K] are what the matrices `names` are about to meet: a view, valid during the call.

        Called for every chunk of the text, in order. A layer's `down` meets act(gate) * up, so its columns
        are the neurons; an expert's `down` meets the rows that chose it; its gate and up meet those of
        the same tokens under the name of the layer's `router`.
        """

    def see_gates(self, layer: int, rows: NDArray[np.float32]) -> None:
        """rows [R, F] are what a layer's activation is about to be applied to: a view, as above."""


class Walk:
    """One text, cut into windows that each stand alone, and where it has got to in the model."""

    def __init__(self, forward: Forward, weights: Weights, windows: Sequence[Sequence[int]]) -> None:
        self.forward, self._weights = forward, weights
        self.windows = windows
        self.tokens = sum(map(len, windows))
        self.reached = weights.spec.first_layer  # the layer that comes next
        self.hidden = np.empty((self.tokens, weights.spec.width), np.float32)  # what comes out below it
        self._taps = find_taps(forward, weights)

    def layer(self, observers: Sequence[Observer]) -> None:
        """The whole text through the next layer."""
        first = self.reached
        self._watch((tap for tap in self._taps if tap.names[0].startswith(f"layers.{first}.")), observers)
        forward, size, at = self.forward, self.forward.config.chunk, 0
        for window in self.windows:
            forward.cache.length = 0
            for start in range(0, len(window), size):
                tokens = window[start : start + size]
                here = self.hidden[at : at + len(tokens)]
                given = here if first > 0 else None
                here[:] = forward.run(tokens, layers=(first, first + 1), hidden=given)
                at += len(tokens)
        self.reached += 1

    def output(self, observers: Sequence[Observer]) -> None:
        """The whole text, once through all layers, through the model's own head."""
        spec, end, at = self._weights.spec, self.reached, 0
        name = "token_embedding" if spec.tied_embeddings else "output"
        # Heads of exits share the output matrix; the model's own comes first in the program.
        self._watch([tap for tap in self._taps if tap.names[0] == name][:1], observers)
        size = min(MAX_OUTPUTS, self.forward.config.chunk)
        for window in self.windows:
            for start in range(0, len(window), size):
                tokens = window[start : start + size]
                rows = self.hidden[at : at + len(tokens)]
                self.forward.cache.length = 0
                self.forward.run(tokens, layers=(end, end), hidden=rows, outputs=range(len(tokens)))
                at += len(tokens)

    def _watch(self, taps: Iterable[Tap], observers: Sequence[Observer]) -> None:
        self.forward.watch = {tap.at: partial(self._show, tap, observers) for tap in taps}

    def _show(self, tap: Tap, observers: Sequence[Observer], count: int) -> None:
        for names, rows in rows_at(tap, self.forward, self._weights, count):
            for observer in observers:
                if tap.gates:
                    observer.see_gates(tap.layer, rows)
                else:
                    observer.see(names, rows)
