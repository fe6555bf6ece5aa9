"""Models with experts: mixtral and those in MODEL_TYPES (Jiang et al., 2024, arXiv:2401.04088).

Attention is Llama's. In place of the feed-forward a router chooses k of E experts for each token, and
their outputs are added, weighted. What differs between them is in the ModelSpec; the multipliers of
Granite are in its weights (converters/architectures/granitemoe.py).
"""

from edgert.config import ACTIVATIONS
from edgert.kernels import program, sparing
from edgert.kernels.matmul import Q8, record_bytes
from edgert.kernels.reference.routing import UNGATED
from edgert.kernels.requests import TABLE
from edgert.model import llama
from edgert.model.builder import Builder
from edgert.model.routing import MOST_FORESEEN, Foreseen, Routing
from edgert.state import Rows, padded

BLOCK = "pre"
MODEL_TYPES = (
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe"),
    *("gpt_oss", "deepseek_v2", "deepseek_v3"),
)


def layer(b: Builder, index: int) -> None:
    """One layer: hidden += attention(norm(hidden)); hidden += experts(norm(hidden)), or ffn."""
    llama.attention(b, index)
    if b.spec.has_experts(index):
        experts(b, index, b.norm(f"layers.{index}.ffn_norm"))
    else:
        llama.feed_forward(b, index)


def experts(b: Builder, index: int, x: Rows) -> None:
    """hidden += the weighted sum of the experts that each row of x chooses, and of the shared one."""
    name, r = f"layers.{index}", b.routing
    gated = r.shared is not None and r.shared.logit is not None
    b.linear(f"{name}.router", x, r.logits, last=not gated)
    if r.shared is not None and r.shared.logit is not None:
        b.linear(f"{name}.shared_router", x, r.shared.logit)
    ahead = b.control is not None and index + 1 < b.spec.last_layer and b.spec.has_experts(index + 1)
    if ahead:
        _foresee(b, index)
    _route(b, index, x)
    if b.control is not None:
        _publish(b, index, b.control, r.foreseen.chosen if ahead else -1)
    if r.shared is not None:
        b.linear(f"{name}.shared_gate", x, r.shared.gate, last=False)
        b.linear(f"{name}.shared_up", x, r.shared.up)
        down = f"{name}.shared_down"
        b.linear(down, b.gated(down, r.shared.gate, r.shared.up), r.shared.out)
    _compute(b, index)


def _foresee(b: Builder, index: int) -> None:
    """What the next layer's router makes of this layer's input: a guess at what it will choose.

    From the residual after attention, with the next layer's own norm (Fate, arXiv:2502.12224,
    with the later input): the experts of this layer are all that is missing in it.
    """
    next_, seen = f"layers.{index + 1}", b.routing.foreseen
    b.foreseen(f"{next_}.ffn_norm", f"{next_}.router", seen.x, seen.logits)
    _choose(b, index + 1, seen, program.FORESEEN, normalized=False, shared=-1, shared_stride=0)


def _choose(
    b: Builder,
    index: int,
    r: Routing | Foreseen,
    rows: int,
    *,
    normalized: bool,
    shared: int,
    shared_stride: int,
) -> None:
    """The experts of each row and their weights, by the router of layer `index`."""
    spec = b.spec
    b.add(
        program.ROUTE,
        rows=rows,
        x=r.logits.at,
        x_stride=r.logits.stride,
        experts=spec.experts,
        active=spec.active_experts,
        normalized=normalized,
        shared=shared,
        shared_stride=shared_stride,
        chosen=r.chosen,
        weights=r.weights.at,
        weights_stride=r.weights.stride,
        choice=r.choice.at if r.choice else -1,
        choice_stride=r.choice.stride if r.choice else 0,
        bias=b.weights.vector(f"layers.{index}.choice_bias"),
        groups=spec.routing_groups,
        kept=spec.active_groups,
    )


def _route(b: Builder, index: int, x: Rows) -> None:
    """The experts of each row, and the rows of each expert side by side."""
    r, spec = b.routing, b.spec
    logit = r.shared.logit if r.shared else None
    _choose(
        b,
        index,
        r,
        program.TOKENS,
        normalized=spec.normalized_routing,
        shared=logit.at if logit else UNGATED if r.shared else -1,
        shared_stride=logit.stride if logit else 0,
    )
    if b.control is not None and any(b.spared):
        _spare(b, index, b.control)
    b.add(
        program.GROUP,
        experts=b.members,
        active=spec.active_experts,
        chosen=r.chosen,
        sources=r.sources,
        places=r.places,
        starts=r.starts,
        busy=r.busy,
        counters=r.counters,
    )
    b.add(
        program.GATHER,
        active=spec.active_experts,
        places=r.places,
        x=x.at,
        groups=x.groups,
        xq=x.quantized,
        y=r.routed.at,
        yq=r.routed.quantized,
        floats=min(b.weights.expert_quants(index)) < Q8,
    )


def _spare(b: Builder, index: int, control: int) -> None:
    """Other experts for rows whose own are not in memory; a chunk of a prompt needs most of them anyway."""
    r, spec = b.routing, b.spec
    near, least, below = (round(share * sparing.UNIT) for share in b.spared)
    b.add(
        program.SPARE,
        x=r.logits.at,
        x_stride=r.logits.stride,
        experts=spec.experts,
        active=spec.active_experts,
        chosen=r.chosen,
        weights=r.weights.at,
        weights_stride=r.weights.stride,
        table=index * b.members * TABLE,
        control=control,
        most=MOST_FORESEEN,
        near=near,
        least=least,
        below=below,
    )


def _publish(b: Builder, index: int, control: int, ahead: int) -> None:
    """Tell the store of streamed experts what this layer needs, and what the next is thought to need."""
    r, spec = b.routing, b.spec
    b.add(
        program.PUBLISH,
        layer=index,
        experts=b.members,
        active=spec.active_experts,
        chosen=r.chosen,
        weights=r.weights.at,
        weights_stride=r.weights.stride,
        busy=r.busy,
        ahead=ahead,
        control=control,
    )


def _compute(b: Builder, index: int) -> None:
    """What the experts give for their rows, and its sum per token."""
    r, spec, tiling = b.routing, b.spec, b.config.tiling
    # Even: an expert's first units also quantise groups of two blocks. The most blocks of any precision
    # in the layer, so that no unit is too small.
    unit = tiling.unit_blocks(int(record_bytes(max(b.weights.expert_quants(index)))) * r.routed.groups)
    b.add(
        program.EXPERTS,
        real=spec.swiglu_alpha,
        cap=spec.swiglu_limit,
        table=index * b.members * TABLE,
        groups=r.routed.groups,
        blocks=-(-spec.expert_width // 16),
        inner=r.gate.groups,
        outer=-(-spec.width // 16),
        unit=-(-unit // 2) * 2,
        kind=ACTIVATIONS.index(spec.activation),
        x=r.routed.at,
        xq=r.routed.quantized,
        g=r.gate.at,
        u=r.up.at,
        h=r.gate.quantized,
        starts=r.starts,
        busy=r.busy,
        counters=r.counters,
        most=tiling.most,
        ahead=tiling.ahead,
        control=-1 if b.control is None else b.control,
        gate_biases=b.weights.vector(f"layers.{index}.experts_gate_bias"),
        up_biases=b.weights.vector(f"layers.{index}.experts_up_bias"),
        down_biases=b.weights.vector(f"layers.{index}.experts_down_bias"),
        inner_rows=spec.expert_width,
        outer_rows=spec.width,
        experts=spec.experts,
    )
    b.add(
        program.COMBINE,
        x=b.hidden.at,
        x_stride=b.hidden.stride,
        width=padded(spec.width),
        y=r.routed.at,
        y_stride=r.routed.stride,
        places=r.places,
        active=spec.active_experts,
        weights=r.weights.at,
        weights_stride=r.weights.stride,
        shared=r.shared.out.at if r.shared else -1,
        shared_stride=r.shared.out.stride if r.shared else 0,
    )
