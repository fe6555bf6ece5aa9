"""The one forward path: token rows in, a range of layers, hidden rows or logits out.

Decode is one row, prefill chunks of rows, a token tree rows with parents, an early exit a shorter
range; keys and values are appended in every case.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.config import EngineConfig
from edgert.errors import UsageError
from edgert.kernels import program
from edgert.kv_cache import KvCache
from edgert.model import layer_of
from edgert.model.builder import Builder
from edgert.model.placing import place
from edgert.state import MAX_OUTPUTS, RunState, Weights
from edgert.team import Team
from edgert.waits import Waits


class Forward:
    """A model ready to run: weights, cache, buffers, program and threads. Close it after use."""

    def __init__(self, weights: Weights, config: EngineConfig) -> None:
        self.spec, self.config = weights.spec, config
        self.cache = KvCache(self.spec, config)
        builder = Builder(weights, config, self.cache)
        write_layer = layer_of(self.spec.architecture)
        builder.rope_table()
        self._embed = builder.position
        first, last = self.spec.first_layer, self.spec.last_layer
        if first == 0:
            builder.embed()
        self._starts = {}  # first operation of each layer held, and past the last
        for layer in range(first, last):
            self._starts[layer] = builder.position
            write_layer(builder, layer)
        self._starts[last] = builder.position
        if last == self.spec.layers:
            x = builder.norm("output_norm", outputs=True)
            output = "token_embedding" if self.spec.tied_embeddings else "output"
            builder.linear(output, x, builder.logits, outputs=True)
        code, reals = builder.table_of_operations()
        self._hidden, self._logits = builder.hidden, builder.logits
        self.state = state = RunState(builder.layout, config)
        self.waits = Waits()
        self._job = np.zeros(program.JOB_WORDS, np.int64)
        arrays = (weights.data, state.f, state.xq, state.xs, state.xn, self.cache.data)
        self.team = Team(
            config.threads, (code, reals, *arrays, state.rows, state.paths, self._job), len(code)
        )

    def close(self) -> None:
        """End the threads."""
        self.team.close()

    def run(
        self,
        tokens: Sequence[int],
        *,
        outputs: Sequence[int] = (),
        parents: Sequence[int] | None = None,
        layers: tuple[int, int] | None = None,
        hidden: NDArray[np.float32] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """One forward of up to `config.chunk` rows, behind the `cache.lengths` positions before them.

        tokens: the rows' ids; `outputs`: the rows whose logits are wanted, at most MAX_OUTPUTS.
        parents: for a token tree, each row's parent row, -1 for the sequence itself; without it each
        row follows the one before and the cache grows by all rows. After a tree the caller decides
        with `cache.keep`. layers: a range [first, last) instead of all; hidden: float32 [T, D] rows to
        start from instead of the tokens' embeddings, for a range that does not start at 0. sequences:
        for a cache of several, the sequence of each row; rows of different ones may stand side by side.

        Returns float32 [outputs, V] logits where the range ends with the last layer and outputs are
        wanted, else the hidden rows [T, D]: views, valid until the next call.
        """
        count = len(tokens)
        first, last = layers or (self.spec.first_layer, self.spec.last_layer)
        self._check(count, len(outputs), first, last)
        rows, job = self.state.rows, self._job
        rows[program.TOKEN, :count] = tokens
        place(self.state, self.cache, count, parents, sequences)
        rows[program.OUTPUT, : len(outputs)] = outputs
        # One by one: assigning to a list of indices costs as much as a layer of a small model.
        job[program.ROWS], job[program.WANTED] = count, len(outputs)
        if hidden is not None:
            self._rows(self._hidden.at, self._hidden.stride, count)[:, : self.spec.width] = hidden
        if hidden is not None or first > 0:
            self._execute(0, self._embed)
            self._execute(self._starts[first], self._end(last, outputs))
        else:
            self._execute(0, self._end(last, outputs))
        if parents is None:
            for sequence in sequences or [0] * count:
                self.cache.lengths[sequence] += 1
        if outputs and last == self.spec.layers:
            return self._rows(self._logits.at, self._logits.stride, len(outputs))[:, : self.spec.vocab]
        return self._rows(self._hidden.at, self._hidden.stride, count)[:, : self.spec.width]

    def _check(self, count: int, outputs: int, first: int, last: int) -> None:
        if not self.spec.first_layer <= first <= last <= self.spec.last_layer:
            raise UsageError(
                f"layers {first} to {last} in one forward, expected a range from {self.spec.first_layer} to "
                f"{self.spec.last_layer}, which this model holds"
            )
        if not 0 < count <= self.config.chunk:
            raise UsageError(f"{count} rows in one forward, expected 1 to {self.config.chunk}")
        if outputs > MAX_OUTPUTS:
            raise UsageError(f"{outputs} rows of logits in one forward, expected at most {MAX_OUTPUTS}")

    def _end(self, last: int, outputs: Sequence[int]) -> int:
        wants_logits = last == self.spec.layers and len(outputs) > 0
        return self._starts[last] + 2 if wants_logits else self._starts[last]

    def _execute(self, first: int, last: int) -> None:
        self._job[program.FIRST], self._job[program.LAST] = first, last
        self.team.run()

    def _rows(self, at: int, stride: int, count: int) -> NDArray[np.float32]:
        return self.state.f[at : at + count * stride].reshape(count, stride)
