"""The buffers of layers of which only the neurons that fire are computed."""

from dataclasses import replace

from edgert.config import QUANTS, EngineConfig
from edgert.kernels.matmul import record_bytes
from edgert.kernels.neuron_packing import SLICE, SPAN
from edgert.kernels.neurons import MOST_ROWS, QUAD_LIST, ROWS_AHEAD
from edgert.state import Layout, Rows, Weights, padded


class Firing:
    """One set for all layers."""

    def __init__(self, weights: Weights, config: EngineConfig, layout: Layout) -> None:
        spec = weights.spec
        groups, inner = -(-spec.width // 32), -(-spec.ffn_width // 32)
        self.spans, self.slices = -(-groups // SPAN), -(-spec.width // SLICE)
        self.live = layout.integers(spec.ffn_width + 1 + ROWS_AHEAD)  # how many neurons fire, and which
        self.quads = layout.integers(config.threads * 2 * QUAD_LIST)  # per thread: of a group and the next
        self.spread = layout.groups  # the rows of x as rows of up take them
        layout.groups += MOST_ROWS * self.spans * SPAN
        # Per thread: the sums of some outputs of down; or of a unit's rows of up, fewer than a slice has.
        self.scratch, self.scratch_stride = layout.floats, SLICE * self.slices
        layout.floats += config.threads * self.scratch_stride
        # Per thread: a block of up, or 8 of down, in the order of rows16.
        stored = [t.quant for t in weights.tensors.values() if t.role in ("neurons", "rows")]
        size = max(int(record_bytes(QUANTS.index(quant))) for quant in stored)
        self.spare_stride = max(self.spans * SPAN, 8 * inner) * size
        layout.spare = config.threads * self.spare_stride
        if config.predict:
            self.wanted = layout.integers(
                padded(spec.ffn_width) + 1 + ROWS_AHEAD
            )  # gates that are, and which
            self.scores = layout.rows(config.chunk, spec.ffn_width)  # [T, F] above zero: expected to fire
        if config.predict and spec.predictors:
            self._inner = layout.rows(config.chunk, max(spec.predictors), quantized=True)  # [T, rank]
        if config.predict and spec.core:
            self.cores = layout.floats  # [S, L, F] scores, above zero for what is in a core
            layout.floats += config.sequences * spec.layers * padded(spec.ffn_width)

    def inner(self, rank: int) -> Rows:
        """The rows between the two matrices of a predictor."""
        return replace(self._inner, stride=rank, groups=rank // 32)
