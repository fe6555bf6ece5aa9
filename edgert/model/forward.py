"""The one forward path: token rows in, a range of layers, hidden rows or logits out.

Decode is one row, prefill chunks of rows, a token tree rows with parents, an early exit a shorter
range; keys and values are appended in every case.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgert.config import DOWN, LEFT_OUT, EngineConfig
from edgert.errors import OptionError, UsageError
from edgert.experts import ExpertStore
from edgert.flash import Store
from edgert.kernels import program
from edgert.kernels.operations import Run
from edgert.kv_cache import KvCache
from edgert.model import layer_of
from edgert.model.builder import Builder
from edgert.model.cores import Cores
from edgert.model.placing import place
from edgert.model.routing import MOST_FORESEEN
from edgert.neurons import NeuronStore
from edgert.state import MAX_OUTPUTS, Rows, RunState, Weights, padded
from edgert.team import Team
from edgert.waits import Waits

WHOLE_AT_START = 16
"""Positions of a sequence that are computed whole before thresholds apply: later tokens attend to the first
ones more than to any others (Xiao et al., 2023, arXiv:2309.17453), so an error there stays."""
EVERYWHERE_WHOLE = 1 << 62
"""For `Forward.whole`: no threshold applies."""


class Forward:
    """A model ready to run: weights, cache, buffers, program and threads. Close it after use."""

    def __init__(self, weights: Weights, config: EngineConfig, store: Store | None = None) -> None:
        self.spec, self.config, self.store = weights.spec, config, store
        if self.spec.learned_positions and config.context > self.spec.context:
            raise OptionError(f"context is {config.context}; this model has {self.spec.context} positions")
        self.cache = KvCache(self.spec, config)
        control = store.control if store else None
        spared = store.streaming.spared if store else (0.0, 0.0, 0.0)
        builder = Builder(weights, config, self.cache, control, spared)
        write_layer = layer_of(self.spec)
        builder.rope_tables()
        self._embed = builder.position
        first, last = self.spec.first_layer, self.spec.last_layer
        if first == 0:
            builder.embed()
        self._starts = {}  # first operation of each layer held, and past the last
        for layer in range(first, last):
            self._starts[layer] = builder.position
            write_layer(builder, layer)
        self._starts[last] = builder.position
        self._heads: dict[int, tuple[int, int]] = {}  # their operations, by the layers before each
        if last == self.spec.layers:
            builder.head()
            self._heads[last] = self._starts[last], builder.position
        for layer in self.spec.held_exits:
            start = builder.position
            builder.exit_head(layer)
            self._heads[layer] = start, builder.position
        code, reals = builder.table_of_operations()
        self.code = code  # [operations, COLUMNS] what the program is, for tools
        self.trims, self._reals = builder.trims, reals
        self.feed_forwards = builder.feed_forwards
        left_out = [layer for layer, least in enumerate(config.inputs) if least[DOWN] >= LEFT_OUT]
        self._left_out = [builder.feed_forwards[layer] for layer in left_out]
        self._hidden, self._chosen, self._logits = builder.hidden, builder.chosen, builder.logits
        self.state = state = RunState(builder.layout, config)
        self.waits = Waits()
        self.cores: Cores | None = None
        self._countings: dict[int, Callable[[int], None]] = {}  # as `watch`, of those of a prompt
        if self.spec.core and config.predict:
            size = config.sequences, self.spec.layers, padded(self.spec.ffn_width)
            at = builder.firing.cores
            scores = state.f[at : at + math.prod(size)].reshape(size)
            self.cores = Cores(self.spec, scores[:, :, : self.spec.ffn_width])
            self._countings = {
                at: partial(self._count, layer, builder.gate) for layer, at in builder.contributions.items()
            }
        # Positions below it are computed whole, whatever the thresholds of the configuration.
        self.whole = EVERYWHERE_WHOLE if config.exact else WHOLE_AT_START
        self._approximate = bool(config.thresholds or config.inputs or config.predict)
        # Called with its rows before an operation runs, all that it reads being there: for calibration.
        self.watch: dict[int, Callable[[int], None]] = {}
        self._job = np.zeros(program.JOB_WORDS, np.int64)
        # Of the last call: its rows, the layer behind which they are, and the cache's lengths.
        self._left: tuple[int, int, tuple[int, ...]] | None = None
        pool = store.arena if store else weights.data
        table = store.table if store else weights.expert_table().reshape(-1)
        run = Run(
            code=code,
            reals=reals,
            w=weights.data,
            pool=pool,
            table=table,
            f=state.f,
            xq=state.xq,
            xs=state.xs,
            xn=state.xn,
            kv=self.cache.data,
            spare=state.spare,
            routes=state.routes,
            rows=state.rows,
            paths=state.paths,
            job=self._job,
        )
        self.team = Team(config.threads, run)
        # Where a layer's experts are computed: with streamed ones a forward can be cut there.
        self._cuts = [i for i, row in enumerate(code) if row[0] == program.EXPERTS]
        if isinstance(store, ExpertStore):
            r = builder.routing
            unit = int(code[self._cuts[0], 3 + program.FIELDS[program.EXPERTS].index("unit")])
            blocks = -(-self.spec.width // 16)
            store.attach_run(state.routes, r.counters, -(-blocks // unit))
        elif isinstance(store, NeuronStore):
            store.attach_run(state.routes)

    def close(self) -> None:
        """End the threads, and the reading of weights."""
        self.team.close()
        if self.store:
            self.store.close()

    def run(
        self,
        tokens: Sequence[int],
        *,
        outputs: Sequence[int] = (),
        parents: Sequence[int] | None = None,
        behind: int = 0,
        layers: tuple[int, int] | None = None,
        hidden: NDArray[np.float32] | None = None,
        sequences: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """One forward of up to `config.chunk` rows, behind the `cache.lengths` positions before them.

        tokens: the rows' ids; `outputs`: the rows whose logits are wanted, at most MAX_OUTPUTS.
        parents: for a token tree, each row's parent row, -1 for the sequence itself; without it each
        row follows the one before and the cache grows by all rows. A tree may grow level by level:
        `behind` of its rows were run before, and parents count them too. After a tree the caller decides
        with `keep`. layers: a range [first, last) instead of all; hidden: float32 [T, D] rows to start
        from instead of the tokens' embeddings. A range that does not start at 0 goes on, where no
        `hidden` is given, with the rows of the last call: those must have ended there, and have their
        slots in the cache already. sequences: for a cache of several, the sequence of each row; rows of
        different ones may stand side by side.

        Returns float32 [outputs, V] logits where outputs are wanted and the range ends with the last
        layer or at one of `spec.exits`, else the `hidden` rows: views, valid until the next call.
        """
        count = len(tokens)
        first, last = layers or (self.spec.first_layer, self.spec.last_layer)
        goes_on = first > 0 and hidden is None
        self._check(tokens, outputs, first, last)
        if goes_on:
            self._check_left(count, first)
        self._left = None  # until this call is through
        rows, job = self.state.rows, self._job
        if not goes_on:
            rows[program.TOKEN, :count] = tokens
            place(self.state, self.cache, count, parents, behind, sequences)
            if self.cores is not None:
                self.cores.begin(sequences or [0] * count, self.cache.lengths, parents is not None)
            if self._approximate:
                self._choose_partial(count, sequences)
        rows[program.OUTPUT, : len(outputs)] = outputs
        # One by one: assigning to a list of indices costs as much as a layer of a small model.
        job[program.ROWS], job[program.WANTED] = count, len(outputs)
        if hidden is not None:
            self.hidden[:] = hidden
            self._execute(0, self._embed)
        head = self._heads.get(last) if len(outputs) else None
        start = self._starts[first] if first or hidden is not None else 0
        began = time.perf_counter()
        job[program.AHEAD] = self.store.begin(count, MOST_FORESEEN) if self.store else 0
        self._run_through(start, last, head)
        if self.store:  # before the cache grows: what could not be read was not computed with
            self.store.end(count, time.perf_counter() - began)
        if parents is None and not goes_on:
            for sequence in sequences or [0] * count:
                self.cache.lengths[sequence] += 1
        if self.cores is not None:
            self.cores.end()
        self._left = count, last, tuple(self.cache.lengths)
        return self.hidden if head is None else self._rows(self._logits, len(outputs))[:, : self.spec.vocab]

    def keep(self, rows: Sequence[int]) -> None:
        """Make a branch of the last tree, its rows from the top, part of the (first) sequence.

        What grew below the branch can still be grown: row r is then row r - len(rows).
        """
        count = len(rows)
        self.cache.keep([self.cache.length + row for row in rows])
        self.state.tree = [path[count:] for path in self.state.tree[count:]]

    def resume(self, shared: int, sequence: int = 0) -> int:
        """Rewind a sequence, for another prompt of which `shared` positions are cached; to how many.

        To fewer where its core would else not be that of this prompt alone.
        """
        if self.cores is not None:
            shared = self.cores.resume(shared, sequence)
        self.cache.rewind(shared, sequence)
        return shared

    def freeze(self, sequence: int = 0) -> None:
        """The prompt of a sequence is through: where the configuration has cores, it goes on with its own."""
        if self.cores is not None:
            self.cores.freeze(sequence)

    @property
    def hidden(self) -> NDArray[np.float32]:
        """The residual rows [T, D] of the last call, behind the layer it ended with: a view."""
        return self._rows(self._hidden, int(self._job[program.ROWS]))[:, : self.spec.width]

    def chosen(self, count: int) -> NDArray[np.float32]:
        """The normed rows [count, D] that the logits of the last call were made of: a view."""
        return self._rows(self._chosen, count)[:, : self.spec.width]

    def set_inputs(self, layer: int, thresholds: Sequence[float]) -> None:
        """Other thresholds for the inputs of a layer, in the order of config.py, where there were some."""
        for which, least in enumerate(thresholds):
            self._reals[self.trims[layer, which], 0] = least

    @property
    def fired(self) -> tuple[int, int]:
        """Neurons computed one by one so far, and how many there were in these layers and forwards."""
        return int(self._job[program.FIRED]), int(self._job[program.NEURONS])

    @property
    def gated(self) -> tuple[int, int]:
        """Gates computed one by one so far, and how many there were where they are predicted."""
        return int(self._job[program.GATES]), int(self._job[program.GATED])

    def _run_through(self, start: int, last: int, head: tuple[int, int] | None) -> None:
        """From operation `start` to the end of the layers before `last`, then a head."""
        end = self._starts[last]
        if head is None:
            self._execute(start, end)
        elif head[0] == end:  # the model's own follows the layers: one dispatch for both
            self._execute(start, head[1])
        else:
            self._execute(start, end)
            self._execute(*head)

    def _check(self, tokens: Sequence[int], outputs: Sequence[int], first: int, last: int) -> None:
        """Compiled code trusts every number that passes here."""
        count, vocab = len(tokens), self.spec.vocab
        if not self.spec.first_layer <= first <= last <= self.spec.last_layer:
            raise UsageError(
                f"layers {first} to {last} in one forward, expected a range from {self.spec.first_layer} to "
                f"{self.spec.last_layer}, which this model holds"
            )
        if not 0 < count <= self.config.chunk:
            raise UsageError(f"{count} rows in one forward, expected 1 to {self.config.chunk}")
        if len(outputs) > MAX_OUTPUTS:
            raise UsageError(f"{len(outputs)} rows of logits in one forward, expected at most {MAX_OUTPUTS}")
        if min(tokens) < 0 or max(tokens) >= vocab:
            wrong = next(token for token in tokens if not 0 <= token < vocab)
            raise UsageError(f"token {wrong} in a forward, expected ids from 0 to {vocab - 1}")
        if len(outputs) and not 0 <= min(outputs) <= max(outputs) < count:
            raise UsageError(f"logits wanted of rows {list(outputs)}, expected rows from 0 to {count - 1}")

    def _check_left(self, count: int, first: int) -> None:
        """The last call's rows can go on from layer `first`, and the cache is as it left it."""
        if self._left != (count, first, tuple(self.cache.lengths)):
            raise UsageError(
                f"{count} rows at layer {first} without their hidden values, which the last call did not "
                "leave there; give them"
            )

    def _choose_partial(self, count: int, sequences: Sequence[int] | None) -> None:
        """Which rows are computed whole: see program.PARTIAL."""
        rows, of = self.state.rows, np.array(sequences or [0] * count)
        partial = rows[program.POSITION, :count] >= self.whole
        if self.cores is not None:
            partial &= np.array(self.cores.frozen)[of]
        rows[program.PARTIAL, :count] = np.where(partial, of, -1)

    def _count(self, layer: int, gate: Rows, count: int) -> None:
        """Tell the cores what the neurons of a layer add to its output."""
        assert self.cores is not None
        self.cores.see(layer, self._rows(gate, count)[:, : self.spec.ffn_width])

    def _execute(self, first: int, last: int) -> None:
        # Where rows are computed whole too, thresholds make the others' inputs of down zero.
        count = int(self._job[program.ROWS])
        if self._left_out and self.state.rows[program.PARTIAL, :count].min() >= 0:
            for start, end in self._left_out:
                if first <= start and end <= last:
                    self._execute_all(first, start)
                    first = end
        self._execute_all(first, last)

    def _execute_all(self, first: int, last: int) -> None:
        store = self.store
        watch = self.watch
        if self.cores is not None and self.cores.counting:
            watch = watch | self._countings
        for watched in sorted(i for i in watch if first <= i < last):
            if watched > first:
                self._dispatch(first, watched)
            of_tokens = self.code[watched, 1] == program.TOKENS
            watch[watched](int(self._job[program.ROWS if of_tokens else program.WANTED]))
            first = watched
        if store and (self.waits.idle is not None or not store.streaming.overlap):
            # Somebody has other work for the time of a wait: come back before each layer's experts.
            for cut in (i for i in self._cuts if first < i < last):
                self._dispatch(first, cut)
                self.waits.until(lambda: store.arrived, store.wait)
                first = cut
        self._dispatch(first, last)

    def _dispatch(self, first: int, last: int) -> None:
        self._job[program.FIRST], self._job[program.LAST] = first, last
        self.team.run()

    def _rows(self, rows: Rows, count: int) -> NDArray[np.float32]:
        return self.state.f[rows.at : rows.at + count * rows.stride].reshape(count, rows.stride)
