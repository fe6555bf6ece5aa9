"""Writes the program of a model: what an architecture file says, as rows of the operation table."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgert.config import ACTIVATIONS, LOCAL_ROPE, NO_ROPE, OUT, EngineConfig
from edgert.format.tensors import POSITIONS, rope_name
from edgert.kernels import program
from edgert.kernels.attention import MOST_HEADS
from edgert.kernels.matmul import Q8, record_bytes
from edgert.kernels.neuron_packing import SPAN
from edgert.kv_cache import KvCache
from edgert.model.compression import LATENT_EPS, Compression
from edgert.model.firing import Firing
from edgert.model.routing import Routing
from edgert.state import MAX_OUTPUTS, Layout, Matrix, Rows, Weights, padded


class Builder:
    """Buffers and operations of one model at one engine configuration.

    An architecture file calls these methods in the order of computation. T is `config.chunk`.
    control: where weights are streamed, the word of the store's table where its control words start. spared:
    the shares of kernels/sparing.py, where fewer reads are worth another text.
    """

    def __init__(
        self,
        weights: Weights,
        config: EngineConfig,
        cache: KvCache,
        control: int | None = None,
        spared: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        spec, rows = weights.spec, config.chunk
        self.spec, self.weights, self.cache, self.config = spec, weights, cache, config
        self.control, self.spared = control, spared
        self.members = spec.experts * (2 if spared[2] else 1)  # experts of a layer, and their stand-ins
        self.layout = layout = Layout()
        self.hidden = layout.rows(rows, spec.width)  # [T, D] the residual stream
        self.normed = layout.rows(rows, spec.width, quantized=True)  # [T, D]
        self.q = layout.rows(rows, spec.heads * spec.head_dim)  # [T, H*d]
        self.k = layout.rows(rows, spec.kv_heads * spec.head_dim)  # [T, K*d]
        self.v = layout.rows(rows, spec.kv_heads * spec.value_width)  # [T, K*d]
        self.mixed = layout.rows(rows, spec.heads * spec.value_width, quantized=True)  # [T, H*d]
        if spec.latent:
            self.compression = Compression(spec, rows, layout)
        if spec.has_dense_layers:
            self.gate = layout.rows(rows, spec.ffn_width, quantized=True)  # [T, F]
            if not spec.plain_ffn:
                self.up = layout.rows(rows, spec.ffn_width)  # [T, F]
        if spec.block != "pre":
            # [T, D] what a layer adds to the residual stream, until its norm; or a second normed input
            self.branch = layout.rows(rows, spec.width, quantized=True)
        self.chosen = layout.rows(MAX_OUTPUTS, spec.width, quantized=True)  # [R, D]
        self.lens = layout.rows(MAX_OUTPUTS if spec.held_exits else 0, spec.width)  # [R, D] of an exit
        self.logits = layout.rows(MAX_OUTPUTS, spec.vocab)  # [R, V]
        self.tables: dict[int, int] = {}  # by rope: [T, rotated] cos and sin of each row's position, unpadded
        for rope in spec.ropes_used:
            self.tables[rope] = layout.floats
            layout.floats += rows * spec.rotated
        # Per thread: scores, outputs and sums of the heads that one call of attention takes.
        self.scratch_stride = padded(MOST_HEADS * (cache.capacity + padded(spec.head_dim) + 1))
        self.scratch = layout.floats
        layout.floats += config.threads * self.scratch_stride
        if spec.outliers:
            self.taken = layout.rows(rows, spec.outliers, quantized=True)  # [T, O] columns taken out of x
        if spec.neurons:
            self.firing = Firing(weights, config, layout)
        if spec.experts:
            self.routing = Routing(spec, self.members, rows, layout)
        self.queries = layout.groups  # per thread: the heads of a call, rotated and quantised
        layout.groups += config.threads * MOST_HEADS * (padded(spec.head_dim) // 32)
        layout.groups += SPAN  # rows of up take the scales of x by spans, past the end of the last row
        self.feed_forwards: dict[int, tuple[int, int]] = {}  # their operations, by layer
        self.contributions: dict[int, int] = {}  # by layer: where act(gate) * up is there, neuron by neuron
        self.trims: dict[tuple[int, int], int] = {}  # the operations that make small inputs zero
        self._code: list[NDArray[np.int64]] = []
        self._reals: list[tuple[float, float]] = []

    def table_of_operations(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The program: int64 [operations, COLUMNS] and float32 [operations, 2]."""
        return np.stack(self._code), np.array(self._reals, np.float32)

    @property
    def position(self) -> int:
        """How many operations there are so far."""
        return len(self._code)

    def embed(self) -> None:
        """hidden = embedding of the tokens (+ that of their positions)."""
        self._embed("token_embedding", program.TOKEN, self.hidden, -1)
        if self.spec.learned_positions:
            self._embed(POSITIONS, program.POSITION, self.normed, self.hidden.at)

    def _embed(self, name: str, word: int, y: Rows, total: int) -> None:
        matrix = self.weights.matrix(name)
        self.add(
            program.EMBED,
            quant=matrix.quant,
            w_at=matrix.at,
            groups=matrix.groups,
            word=word,
            y=y.at,
            y_stride=y.stride,
            sum=total,
            sum_stride=self.hidden.stride,
        )

    def rope_tables(self) -> None:
        """Cos and sin of the rows' positions."""
        for rope, table in self.tables.items():
            self.add(
                program.ROPE_TABLE,
                real=1.0 if rope == LOCAL_ROPE else self.spec.rope_magnitude,
                frequencies=self.weights.vector(rope_name(rope)),
                half=self.spec.rotated // 2,
                table=table,
            )

    def norm(self, gain: str, place: tuple[int, int] | None = None) -> Rows:
        """normed = norm of hidden, RMSNorm or LayerNorm; place: the layer and whose input (see config.py)."""
        if place is None or not self.config.inputs:
            return self._norm(gain, self.hidden, self.normed, program.TOKENS)
        self._norm(gain, self.hidden, replace(self.normed, quantized=-1), program.TOKENS)
        return self.quantize(self.normed, place)

    def second_norm(self, gain: str) -> Rows:
        """branch = norm of hidden, beside what `norm` gave."""
        return self._norm(gain, self.hidden, self.branch, program.TOKENS)

    def add_normed(self, gain: str) -> None:
        """hidden += norm of branch."""
        plain = replace(self.branch, quantized=-1)
        self._norm(gain, plain, plain, program.TOKENS, total=self.hidden)

    def raw(self) -> Rows:
        """hidden as it is, quantised for what follows."""
        return self.quantize(replace(self.hidden, quantized=self.normed.quantized))

    def head(self) -> None:
        """logits = E rmsnorm(hidden), of the rows whose logits are wanted; E is the output matrix."""
        self._logits_of(self._norm("output_norm", self.hidden, self.chosen, program.OUTPUTS))

    def exit_head(self, layer: int) -> None:
        """logits after `layer` layers: E rmsnorm(n + W n), n = rmsnorm(hidden), of the wanted rows.

        A tuned lens (Belrose et al., 2023, arXiv:2303.08112, section 2) without bias: as the norm before
        E does not see the scale of its input, n + W n is what h + A h is there. hidden stays as it is.
        """
        name = f"exits.{layer}"
        n = self._norm(f"{name}.norm", self.hidden, self.chosen, program.OUTPUTS)
        self._norm(f"{name}.norm", self.hidden, self.lens, program.OUTPUTS)
        self.linear(f"{name}.matrix", n, self.lens, add=True, rows=program.CHOSEN)
        self._logits_of(self._norm(f"{name}.output_norm", self.lens, self.chosen, program.CHOSEN))

    def _logits_of(self, x: Rows) -> None:
        output = "token_embedding" if self.spec.tied_embeddings else "output"
        self.linear(output, x, self.logits, rows=program.CHOSEN)
        if self.spec.logit_cap:
            self._activate(self.logits, rows=program.CHOSEN, cap=self.spec.logit_cap)

    def joint_norm(self, gain: str, x: Rows, width: int) -> None:
        """RMSNorm of x in place, over all its heads together."""
        self._norm(gain, x, x, program.TOKENS, width, centred=False)

    def foreseen(self, gain: str, router: str, x: Rows, y: Rows) -> None:
        """y = a router's logits of hidden as it is now, in the rows for which that is wanted."""
        self._norm(gain, self.hidden, x, program.FORESEEN)
        self.linear(router, x, y, rows=program.FORESEEN)

    def latent_norm(self, gain: str, x: Rows, y: Rows, width: int) -> Rows:
        """y = RMSNorm of a latent of `width`."""
        return self._norm(gain, x, y, program.TOKENS, width, centred=False, eps=LATENT_EPS)

    def _norm(
        self,
        gain: str,
        x: Rows,
        y: Rows,
        rows: int,
        width: int = 0,
        *,
        eps: float | None = None,
        centred: bool | None = None,
        total: Rows | None = None,
    ) -> Rows:
        self.add(
            program.NORM,
            rows=rows,
            real=self.spec.norm_eps if eps is None else eps,
            x=x.at,
            x_stride=x.stride,
            width=width or self.spec.width,
            gain=self.weights.vector(gain),
            y=y.at,
            y_stride=y.stride,
            groups=y.groups if y.quantized >= 0 else 0,
            xq=y.quantized,
            bias=self.weights.vector(f"{gain}_bias"),
            centred=self.spec.layer_norm if centred is None else centred,
            sum=total.at if total else -1,
            sum_stride=total.stride if total else 0,
        )
        return y

    def linear(
        self,
        name: str,
        x: Rows,
        y: Rows,
        *,
        add: bool = False,
        last: bool = True,
        rows: int = program.TOKENS,
    ) -> None:
        """y = W x + bias, or y += ...; `last` of those that read x and may run side by side.

        rows: what x and y hold, CHOSEN for the rows whose logits are wanted. Columns of W that are stored
        apart meet what `take_outliers` took out of x.
        """
        apart = f"{name}_outliers"
        has = apart in self.weights.tensors
        bias = self.weights.vector(f"{name}_bias")
        self._linear(self.weights.matrix(name), bias, x, y, add=add, last=last or has, rows=rows)
        if has:
            self._linear(self.weights.matrix(apart), -1, self.taken, y, add=True, last=last, rows=rows)

    def take_outliers(self, name: str, x: Rows) -> Rows:
        """x without the columns that the matrices behind it store apart; x as it is where there are none."""
        columns = self.weights.vector(f"{name}_columns")
        if columns >= 0:
            self.add(
                program.TAKE,
                x=x.at,
                x_stride=x.stride,
                groups=x.groups,
                xq=x.quantized,
                columns=columns,
                count=self.spec.outliers,
                y=self.taken.at,
                y_stride=self.taken.stride,
                yq=self.taken.quantized,
            )
        return x

    def linear_by_head(self, name: str, x: Sequence[Rows], y: Sequence[Rows]) -> None:
        """y[h] = W[h] x[h]: the rows of the matrix `name` are those of one matrix for each head in turn."""
        whole, heads = self.weights.matrix(name), len(y)
        blocks = whole.blocks // heads
        step = blocks * whole.groups * int(record_bytes(whole.quant))
        for h in range(heads):
            part = whole._replace(at=whole.at + h * step, blocks=blocks)
            self._linear(part, -1, x[h], y[h], last=h + 1 == heads)

    def _linear(
        self,
        matrix: Matrix,
        bias: int,
        x: Rows,
        y: Rows,
        *,
        add: bool = False,
        last: bool = True,
        rows: int = program.TOKENS,
    ) -> None:
        tiling = self.config.tiling
        self.add(
            program.MATMUL,
            rows=rows,
            barrier=last,
            quant=matrix.quant,
            w_at=matrix.at,
            groups=matrix.groups,
            blocks=matrix.blocks,
            unit=tiling.unit_blocks(int(record_bytes(matrix.quant)) * matrix.groups),
            x=x.at,
            x_stride=x.stride,
            xq=x.quantized,
            y=y.at,
            y_stride=y.stride,
            bias=bias,
            keep=add,
            most=tiling.most,
            ahead=tiling.ahead,
        )

    def heads(self, layer: int) -> None:
        """Norm and rotation of q and k heads; k and v into the cache."""
        rope = self.spec.rope(layer)
        self.add(
            program.HEADS,
            real=self.spec.norm_eps,
            q=self.q.at,
            q_stride=self.q.stride,
            k=self.k.at,
            k_stride=self.k.stride,
            v=self.v.at,
            v_stride=self.v.stride,
            q_gain=self.weights.vector(f"layers.{layer}.q_norm") if self.spec.qk_norm else -1,
            k_gain=self.weights.vector(f"layers.{layer}.k_norm") if self.spec.qk_norm else -1,
            heads=self.spec.heads,
            kv_heads=self.spec.kv_heads,
            d=self.spec.head_dim,
            dv=self.spec.value_width,
            rotary=0 if rope == NO_ROPE else self.spec.rotated,
            table=self.tables.get(rope, 0),
            kind=self.cache.kind,
            region=self.cache.layer(layer),
            region_bytes=self.cache.region_bytes,
            capacity=self.cache.capacity,
            scratch=self.scratch,
            scratch_stride=self.scratch_stride,
        )

    def attend(self, layer: int) -> Rows:
        """mixed = attention of every head, quantised for what follows."""
        self.add(
            program.ATTEND,
            real=float(self.spec.head_dim) ** -0.5,
            cap=self.spec.attention_cap,
            q=self.q.at,
            q_stride=self.q.stride,
            heads=self.spec.heads,
            kv_heads=self.spec.kv_heads,
            d=self.spec.head_dim,
            dv=self.spec.value_width,
            kind=self.cache.kind,
            region=self.cache.layer(layer),
            region_bytes=self.cache.region_bytes,
            capacity=self.cache.capacity,
            window=self.spec.window(layer),
            y=self.mixed.at,
            y_stride=self.mixed.stride,
            scratch=self.scratch,
            scratch_stride=self.scratch_stride,
            queries=self.queries,
            slopes=self.weights.vector("alibi_slopes"),
            sinks=self.weights.vector(f"layers.{layer}.sinks"),
        )
        return self.quantize(self.mixed, (layer, OUT))

    def quantize(self, x: Rows, place: tuple[int, int] | None = None, *, last: bool = True) -> Rows:
        """The quantised rows of x; of an input that has a threshold, what is below it is zero in x too.

        place: see `norm`. last: of those that may run side by side.
        """
        least = 0.0
        if place is not None and self.config.inputs:
            self.trims[place] = self.position
            least = self.config.inputs[place[0]][place[1]]
        self.add(
            program.QUANTIZE,
            barrier=last,
            real=least,
            x=x.at,
            x_stride=x.stride,
            groups=x.groups,
            xq=x.quantized,
        )
        return x

    def gated(
        self, down: str, gate: Rows, up: Rows | None = None, place: tuple[int, int] | None = None
    ) -> Rows:
        """gate = act(gate) * up, or act(gate), quantised where the matrix `down` that follows wants it so."""
        if place is not None and self.config.inputs:
            self._activate(replace(gate, quantized=-1), up)
            return self.quantize(gate, place)
        wants = self.weights.matrix(down).quant >= Q8
        self._activate(gate if wants else replace(gate, quantized=-1), up)
        return gate

    def _activate(
        self, x: Rows, up: Rows | None = None, *, rows: int = program.TOKENS, cap: float = 0.0
    ) -> None:
        self.add(
            program.GATE,
            rows=rows,
            cap=cap,
            kind=ACTIVATIONS.index(self.spec.activation),
            g=x.at,
            u=up.at if up else -1,
            stride=x.stride,
            groups=x.groups,
            xq=x.quantized,
        )

    def add(
        self,
        op: int,
        *,
        rows: int = program.TOKENS,
        barrier: bool = True,
        real: float = 0.0,
        cap: float = 0.0,
        **operands: int,
    ) -> None:
        """Append one operation; its operands are those of `program.FIELDS`."""
        self._code.append(program.encode(op, rows, barrier, **operands))
        self._reals.append((real, cap))
