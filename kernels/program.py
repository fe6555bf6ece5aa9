"""A forward pass as a table of operations; execute.py executes it.

A program is an int64 array [operations, COLUMNS] and a float32 array [operations, 2] beside it. Every
operation is cut into units; threads take units from an atomic counter, so that a slow core takes
fewer, and meet at a barrier where the next operation needs all of them. Each unit computes its
outputs whole and in a fixed order, so results depend neither on threads nor on who took what.

Operands are indices into the arrays of a run: w (the weights, bytes), f (float32 buffers), xq, xs, xn
(quantised rows, by group), kv (the cache, bytes), spare (weights in another order, bytes), routes (which
expert takes which row, or which neurons fire, int64), and table, which says where in pool (bytes) each
expert lies; operations.py lists them. Column 0 is the operation, column 1 what its rows are
(see TOKENS), column 2 whether a barrier follows; the rest is listed in FIELDS.
"""

import numpy as np
from numpy.typing import NDArray

COLUMNS = 27
(
    EMBED,
    ROPE_TABLE,
    NORM,
    MATMUL,
    HEADS,
    ATTEND,
    QUANTIZE,
    GATE,
    ROUTE,
    GROUP,
    GATHER,
    EXPERTS,
    COMBINE,
    PUBLISH,
    ACTIVATE,
    LIVE,
    NEURONS_UP,
    NEURONS_DOWN,
    SPARE,
    PREDICTED,
    GATE_ROWS,
    NEURONS_READ,
    TAKE,
) = range(23)
OF_EXPERTS = (ROUTE, GROUP, GATHER, EXPERTS, COMBINE, PUBLISH, SPARE, TAKE)
OF_NEURONS = (ACTIVATE, LIVE, NEURONS_UP, NEURONS_DOWN, PREDICTED, GATE_ROWS, NEURONS_READ, TAKE)
"""Operations that a model without experts, or without neurons one by one, does not have; TAKE, of outlier
columns, is rare and small, and therefore in both."""
TOKENS, OUTPUTS, CHOSEN, FORESEEN = range(4)
"""Rows of an operation: all tokens; the wanted ones, gathered from among them; those gathered before; or
all tokens where the next layer's experts are to be predicted, else none."""

FIELDS = {
    EMBED: ("quant", "w_at", "groups", "word", "y", "y_stride", "sum", "sum_stride"),
    ROPE_TABLE: ("frequencies", "half", "table"),
    NORM: (
        *("x", "x_stride", "width", "gain", "y", "y_stride", "groups", "xq"),
        *("bias", "centred", "sum", "sum_stride"),
    ),
    MATMUL: (
        "quant",
        "w_at",
        "groups",
        "blocks",
        "unit",
        "x",
        "x_stride",
        "xq",
        "y",
        "y_stride",
        "bias",
        "keep",
        "most",
        "ahead",
    ),
    HEADS: (
        *("q", "q_stride", "k", "k_stride", "v", "v_stride", "q_gain", "k_gain", "heads", "kv_heads"),
        *(
            "d",
            "dv",
            "rotary",
            "table",
            "kind",
            "region",
            "region_bytes",
            "capacity",
            "scratch",
            "scratch_stride",
        ),
    ),
    ATTEND: (
        *("q", "q_stride", "heads", "kv_heads", "d", "dv", "kind", "region", "region_bytes", "capacity"),
        *("window", "y", "y_stride", "scratch", "scratch_stride", "queries", "slopes", "sinks"),
    ),
    QUANTIZE: ("x", "x_stride", "groups", "xq"),
    GATE: ("kind", "g", "u", "stride", "groups", "xq"),
    ROUTE: (
        *("x", "x_stride", "experts", "active", "normalized", "shared", "shared_stride"),
        *("chosen", "weights", "weights_stride", "choice", "choice_stride", "bias", "groups", "kept"),
    ),
    GROUP: (*("experts", "active", "chosen", "sources", "places", "starts", "busy", "counters"),),
    GATHER: ("active", "places", "x", "groups", "xq", "y", "yq", "floats"),
    EXPERTS: (
        *("table", "groups", "blocks", "inner", "outer", "unit", "kind", "x", "xq", "g", "u", "h"),
        *("starts", "busy", "counters", "most", "ahead", "control"),
        *("gate_biases", "up_biases", "down_biases", "inner_rows", "outer_rows", "experts"),
    ),
    PUBLISH: (
        *("layer", "experts", "active", "chosen", "weights", "weights_stride", "busy", "ahead", "control"),
    ),
    ACTIVATE: ("kind", "g", "stride", "groups", "scores"),
    PREDICTED: ("x", "groups", "spread", "scores", "stride", "width", "live", "cores", "cores_stride"),
    GATE_ROWS: (
        *("quant", "w_at", "groups", "width", "live", "x", "spread", "g", "stride"),
        *("scratch", "scratch_stride", "spare_stride", "most", "ahead"),
    ),
    LIVE: ("x", "groups", "spread", "g", "stride", "width", "live"),
    NEURONS_READ: ("word", "file_at", "nbytes", "cluster", "bundle", "live", "whole", "control"),
    NEURONS_UP: (
        *("quant", "w_at", "groups", "width", "live", "x", "spread", "g", "u", "stride"),
        *("scratch", "scratch_stride", "spare_stride", "most", "ahead", "word", "whole", "control"),
    ),
    NEURONS_DOWN: (
        *("quant", "w_at", "groups", "inner", "unit", "h", "y", "y_stride"),
        *("scratch", "scratch_stride", "spare_stride", "most", "ahead", "quads", "word", "whole"),
    ),
    SPARE: (
        *("x", "x_stride", "experts", "active", "chosen", "weights", "weights_stride", "table", "control"),
        *("most", "near", "least", "below"),
    ),
    TAKE: ("x", "x_stride", "groups", "xq", "columns", "count", "y", "y_stride", "yq"),
    COMBINE: (
        *("x", "x_stride", "width", "y", "y_stride", "places", "active", "weights", "weights_stride"),
        *("shared", "shared_stride"),
    ),
}
"""Operands of each operation, in the order of its columns from 3 on, which its function unpacks.

    EMBED       y[t] = W[token t], or of another of the row's words; added to sum[t] where sum >= 0
    ROPE_TABLE  table[t] = cos and sin of position t                  (real: magnitude)
    NORM        y[t] = rmsnorm(x[t]), or, centred, layernorm (+ bias); quantised too where groups > 0;
                added to sum[t] where sum >= 0                        (real: eps)
    MATMUL      y[t] = W x[t] (+ bias); added to y where keep; reads xq for q8 and q4, else x
                (`unit` blocks at a time; `most` and `ahead` as in matmul.py)
    HEADS       q and k heads: norm where gain >= 0, rotate the first `rotary` dimensions; k and v into
                the cache                                             (real: eps)
    ATTEND      y[t] = attention of every head                        (real: scale; cap: of the scores, or 0)
    QUANTIZE    xq[t] = int8 of x[t], zero in x[t] too where below a threshold (real: threshold, or 0)
    GATE        g[t] = act(g[t]) * u[t], or act(g[t]) where u < 0, or soft-capped; quantised too where
                xq >= 0                                               (cap: of a soft cap, else 0)
    ROUTE       the experts of row t and their weights (routing.py); `choice`: room for what they are
                chosen by where it is not their logits, else below 0
    SPARE       other choices for the sake of fewer reads, of at most `most` rows (sparing.py)
    GROUP       the entries of every expert; one unit
    PUBLISH     what the layer needs, to the store of streamed experts; one unit
    TAKE        y[t] = some columns of x[t], which are zero there then; both quantised (columns.py)
    GATHER      y[i] = x[t], quantised rows and, where asked, floats, for the entries i of row t
    EXPERTS     the experts of all entries, in place of their x (experts.py); no units
                                                                        (real, cap: of a clamped gate, or 0)
    COMBINE     x[t] += the weighted sum of the entries of row t
    PREDICTED   which neurons have a score above zero, and x as GATE_ROWS takes it; where cores >= 0 the
                scores of row t are those of its sequence's core; one unit (gate_rows.py)
    GATE_ROWS   g[t] = W_gate x[t] for these neurons, or for all
    ACTIVATE    g[t] = act(g[t]), or 0 below the threshold, or where the score is not above zero
                                                                      (real: threshold)
    LIVE        which neurons' g is not zero, and x as NEURONS_UP takes it where it is given; one unit
    NEURONS_READ  those of them that are not in memory are asked for (neuron_reads.py); one unit
    NEURONS_UP  g[t] *= W_up x[t] for these neurons (neurons.py)
    NEURONS_DOWN  y[t] += W_down h[t], from the neurons whose h is not zero

Buffers hold one row per token at their stride. A row is padded with zeros to whole groups of 32.
"""

# The job of one execution.
FIRST, LAST, ROWS, WANTED, AHEAD, FIRED, NEURONS, GATES, GATED = range(9)
JOB_WORDS = 9
"""FIRST, LAST: operations; ROWS: tokens; WANTED: output rows; AHEAD: rows for which
experts are predicted; FIRED, NEURONS: counted on, the neurons that were computed and those
there were where single ones could be; GATES, GATED: of these the gates, where they are predicted."""

# Rows of the int64 array that describes the tokens of a forward.
TOKEN, POSITION, SLOT, SEQUENCE, DIRECT, OUTPUT, PARTIAL = range(7)
TOKEN_WORDS = 7
"""TOKEN, POSITION: its id, and its place in its sequence; SLOT: where its key and value go; SEQUENCE: the
byte where the cache of its sequence starts; DIRECT: positions below it lie in their own slots, those from
it on in the slots of the row's `paths`; OUTPUT: (of the first WANTED columns) the row to give; PARTIAL: the
number of its sequence, or -1 for a row that is computed whole: it keeps what is below a threshold, neurons
that are predicted to be silent, and those outside of a core."""
PATH = 64
"""Length of a row of `paths`: slots of the ancestors of a tree node, itself last; the deepest tree."""


def encode(op: int, rows: int, barrier: bool, **operands: int) -> NDArray[np.int64]:
    """One row of the table; every operand of FIELDS[op] must be given, and no other."""
    if set(operands) != set(FIELDS[op]):
        raise AssertionError(f"operands {sorted(operands)}, expected {sorted(FIELDS[op])}")
    row = np.zeros(COLUMNS, np.int64)
    row[:3] = op, rows, barrier
    row[3 : 3 + len(FIELDS[op])] = [operands[name] for name in FIELDS[op]]
    return row
