"""A feed-forward of which only the neurons that fire are computed (kernels/neurons.py)."""

from edgert.config import ACTIVATIONS, QUANTS
from edgert.kernels import program
from edgert.kernels.neuron_packing import NeuronShape
from edgert.model.builder import Builder
from edgert.state import Rows


def feed_forward(b: Builder, index: int, x: Rows) -> None:
    """hidden += W_down (act(W_gate x) * W_up x), of the neurons that fire."""
    spec, at = b.spec, b.weights.neurons(index)
    firing, rank, control = b.firing, b.spec.predictor(index), -1 if b.control is None else b.control
    by_rows = spec.gate_rows(index)
    predicted = by_rows and b.config.predict
    if predicted:
        _predict(b, index, x, firing.inner(rank) if rank else None)
    if by_rows:
        _gate_rows(b, index, x, firing.wanted if predicted else -1)
    else:
        b.linear(f"layers.{index}.gate", x, b.gate)
    b.add(
        program.ACTIVATE,
        real=b.config.thresholds[index] if b.config.thresholds else 0.0,
        kind=ACTIVATIONS.index(spec.activation),
        g=b.gate.at,
        stride=b.gate.stride,
        groups=b.gate.groups,
        scores=firing.scores.at if predicted else -1,
    )
    b.add(
        program.LIVE,
        x=-1 if predicted else x.quantized,
        groups=x.groups,
        spread=firing.spread,
        g=b.gate.at,
        stride=b.gate.stride,
        width=spec.ffn_width,
        live=firing.live,
    )
    if at.word >= 0:
        sizes = NeuronShape.of(QUANTS[at.quant], spec.width)
        b.add(
            program.NEURONS_READ,
            word=at.word,
            file_at=at.file_at,
            nbytes=at.nbytes,
            cluster=sizes.cluster,
            bundle=sizes.up + sizes.down,
            live=firing.live,
            whole=at.whole,
            control=control,
        )
    _add(
        b,
        program.NEURONS_UP,
        quant=at.quant,
        w_at=at.at,
        groups=x.groups,
        width=spec.ffn_width,
        live=firing.live,
        x=x.quantized,
        spread=firing.spread,
        g=b.gate.at,
        u=b.up.at,
        stride=b.up.stride,
        word=at.word,
        whole=at.whole,
        control=control,
    )
    b.contributions[index] = b.position
    b.quantize(b.gate)
    _add(
        b,
        program.NEURONS_DOWN,
        quant=at.quant,
        w_at=at.at,
        groups=x.groups,
        inner=b.gate.groups,
        # One unit per thread: the longer the pieces of a column, the better memory streams them. (One thread
        # reads columns of 4096 outputs 1.3 times as fast whole as by halves.)
        unit=-(-firing.slices // b.config.threads),
        h=b.gate.quantized,
        y=b.hidden.at,
        y_stride=b.hidden.stride,
        quads=firing.quads,
        word=at.word,
        whole=at.whole,
    )


def _predict(b: Builder, index: int, x: Rows, inner: Rows | None) -> None:
    """Which neurons are wanted: those with a score above zero.

    It is W_out (W_in x) + b, by way of `inner`; or, without that, what the core of a row's sequence says.
    """
    firing, name, stride = b.firing, f"layers.{index}", b.firing.scores.stride
    if inner is not None:
        b.linear(f"{name}.predictor_in", x, inner)
        b.linear(f"{name}.predictor_out", b.quantize(inner), firing.scores)
    b.add(
        program.PREDICTED,
        x=x.quantized,
        groups=x.groups,
        spread=firing.spread,
        scores=firing.scores.at,
        stride=firing.scores.stride,
        width=b.spec.ffn_width,
        live=firing.wanted,
        cores=-1 if inner is not None else firing.cores + index * stride,
        cores_stride=b.spec.layers * stride,
    )


def _gate_rows(b: Builder, index: int, x: Rows, wanted: int) -> None:
    """gate = W_gate x, of the neurons listed from word `wanted`; of all where that is -1."""
    matrix, firing = b.weights.matrix(f"layers.{index}.gate"), b.firing
    _add(
        b,
        program.GATE_ROWS,
        quant=matrix.quant,
        w_at=matrix.at,
        groups=x.groups,
        width=b.spec.ffn_width,
        live=wanted,
        x=x.quantized,
        spread=firing.spread,
        g=b.gate.at,
        stride=b.gate.stride,
    )


def _add(b: Builder, op: int, **operands: int) -> None:
    """An operation on single neurons: a thread has room for its sums, and for blocks that are multiplied."""
    firing, tiling = b.firing, b.config.tiling
    b.add(
        op,
        barrier=True,
        scratch=firing.scratch,
        scratch_stride=firing.scratch_stride,
        spare_stride=firing.spare_stride,
        most=tiling.most,
        ahead=tiling.ahead,
        **operands,
    )
