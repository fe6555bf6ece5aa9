"""Thresholds for the inputs of products, so that a share of all weights meets zeros.

TEAL (Liu et al., 2024, arXiv:2408.14690): within a layer, ever more of the inputs are taken for zero where it
changes the layer's output least, until the layer has its share. Here q, k and v have one level, because they
meet the same rows, and so have gate and up.
"""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.calibration.skipping import find_skips
from edgert.calibration.text import read_text
from edgert.config import EngineConfig, ModelSpec
from edgert.errors import ConversionError, OptionError, UsageError
from edgert.format import ErtFile
from edgert.format.inputs import INPUTS_KEY, PLACES, InputThresholds, can_have_inputs
from edgert.format.rewrite import rewrite
from edgert.model.forward import WHOLE_AT_START, Forward
from edgert.planner import plan
from edgert.state import Weights
from edgert.tokenizer import Tokenizer

TOKENS: Final = 2048
"""Of the text. Each layer is run over them 32 times for a share of 0.4."""
STEP: Final = 0.05
"""Share of a layer's weights by which zeros grow at a time."""

Floats = NDArray[np.float32]


WAYS: Final = ("teal", "skip")
"""What a share can be of: weights that meet zeros, or feed-forwards that are left out (skipping.py)."""


def write_with_inputs(converted: Path, out: Path, text: Path, way: str, share: float) -> None:
    """Find the thresholds for a share in a converted file, and write it with them to `out`."""
    with ErtFile.open(converted) as file:
        if not can_have_inputs(file.spec):
            raise OptionError(
                f"sparsity is {way}:{share} for {file.spec.architecture}; expected a model without experts "
                "and latents, with norms before attention and feed-forward"
            )
        json_bytes = file.tokenizer_json()
        if json_bytes is None:
            raise ConversionError(
                f"{text} cannot calibrate a model without a tokenizer; expected one in the source"
            )
        spec = file.spec
        config = plan(spec, file.size, context=min(spec.context, 256), chunk=min(spec.context, 256))
        windows = read_text(text, Tokenizer(json_bytes), config.context, TOKENS).windows
        if max(map(len, windows)) <= WHOLE_AT_START:
            raise UsageError(f"{text}: found no document longer than {WHOLE_AT_START} tokens, expected some")
        find = find_inputs if way == "teal" else find_skips
        found = find(Weights.of_file(file), config, windows, share)
        rewrite(file, out, {INPUTS_KEY: json.dumps(found.to_json(), separators=(",", ":"))})


def find_inputs(
    weights: Weights, config: EngineConfig, windows: Sequence[Sequence[int]], share: float
) -> InputThresholds:
    """Thresholds for `share` in every layer; windows of token ids, each of one chunk at most."""
    spec = weights.spec
    config = replace(config, inputs=((0.0,) * PLACES,) * spec.layers)
    thresholds, zeros = [], []
    with closing(Forward(weights, config)) as forward:
        hidden = []
        for tokens in windows:
            forward.cache.length = 0
            hidden.append(forward.run(tokens, layers=(0, 0)).copy())
        for index in range(spec.layers):
            layer = _Layer(forward, index, windows, hidden)
            levels = _levels(layer, _weights_at(spec), share)
            found = layer.quantiles(levels)
            thresholds.append(tuple(found))
            zeros.append(tuple(round(level, 4) for level in levels))
            hidden = layer.whole
    return InputThresholds(share, tuple(thresholds), tuple(zeros))


def _weights_at(spec: ModelSpec) -> tuple[int, ...]:
    """How many weights of a layer meet the inputs of each place."""
    heads, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    up = spec.width * spec.ffn_width
    return (spec.width * (heads + 2 * kv), spec.width * heads, up if spec.plain_ffn else 2 * up, up)


class _Layer:
    """One layer over a text, again and again: what it gives whole, and with thresholds."""

    def __init__(
        self, forward: Forward, index: int, windows: Sequence[Sequence[int]], hidden: list[Floats]
    ) -> None:
        self._forward, self._index, self._windows, self._hidden = forward, index, windows, hidden
        self._seen: list[list[Floats]] = [[] for _ in range(PLACES)]
        places = {forward.trims[index, place]: place for place in range(PLACES)}
        forward.watch = {at: partial(self._see, at, place) for at, place in places.items()}
        self.whole = self._run([0.0] * PLACES)
        forward.watch = {}
        # [values, ascending] of the magnitudes at each place, past the positions that are computed whole
        self._sizes = [np.sort(np.concatenate(seen), axis=None) for seen in self._seen]

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        """The thresholds below which these shares of the inputs lie."""
        pairs = zip(self._sizes, levels, strict=True)
        return [float(sizes[int(level * (len(sizes) - 1))]) if level else 0.0 for sizes, level in pairs]

    def error(self, levels: Sequence[float]) -> float:
        """The mean square by which the layer's output is another with these shares of zeros."""
        pairs = zip(self._run(self.quantiles(levels)), self.whole, strict=True)
        return float(sum(np.square(a - b, dtype=np.float64).sum() for a, b in pairs))

    def _run(self, thresholds: Sequence[float]) -> list[Floats]:
        forward, layers = self._forward, (self._index, self._index + 1)
        forward.set_inputs(self._index, thresholds)
        found = []
        for tokens, rows in zip(self._windows, self._hidden, strict=True):
            forward.cache.length = 0
            found.append(forward.run(tokens, layers=layers, hidden=rows).copy())
        return found

    def _see(self, at: int, place: int, count: int) -> None:
        row, f = self._forward.code[at], self._forward.state.f
        x, stride = int(row[3]), int(row[4])
        rows = f[x : x + count * stride].reshape(count, stride)
        self._seen[place].append(np.abs(rows[WHOLE_AT_START:, : self._width(place)]))

    def _width(self, place: int) -> int:
        spec = self._forward.spec
        return (spec.width, spec.heads * spec.head_dim, spec.width, spec.ffn_width)[place]


def _levels(layer: _Layer, weights: Sequence[int], share: float) -> list[float]:
    """Shares of zeros per place, of which the weighted mean is `share`."""
    levels, total, reached = [0.0] * len(weights), sum(weights), 0.0
    while reached < share - 1e-9:
        step = min(STEP, share - reached)
        tried = []
        for place, count in enumerate(weights):
            raised = list(levels)
            raised[place] += step * total / count
            if raised[place] < 1:
                tried.append((layer.error(raised), raised))
        _, levels = min(tried)
        reached += step
    return levels
