"""The experts of a model as segments of its file, and what is told of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, ModelSpec
from edgert.flash import Index, Key, Parts, Reading, Segment, SegmentStore, Source, Streaming, ring
from edgert.flash.policy import make_policy
from edgert.flash.predict import make_predictor
from edgert.format import StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import expert_name, stand_in_name
from edgert.kernels import experts as kernel


class ExpertStore(SegmentStore):
    """Streams the experts of one open model: a group is a layer, a member an expert.

    tensors: those of the file, the experts' among them; and the stand-ins', which are members too, each the
    number of experts behind its own (kernels/sparing.py). uses [L, E]: how often the calibration text used
    each expert; None where the file does not say.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, StoredTensor],
        source: Source,
        slots: int,
        streaming: Streaming,
        *,
        reading: Reading | None = None,
        uses: NDArray[np.int64] | None = None,
        order: Callable[[list[int]], list[int]] = list,
    ) -> None:
        self.spec = spec
        index = index_of(spec, tensors)
        members = max(len(group) for group in index)
        super().__init__(
            index,
            source,
            slots,
            streaming,
            make_policy(streaming.policy, spec.layers, members),
            make_predictor(streaming.predictor, spec.layers, members, spec.active_experts),
            reading or Reading(),
            order=order,
        )
        self.pinned = 0
        if uses is not None and streaming.pinned:
            most = self.slots.count - max(2, spec.active_experts)
            count = min(most, int(streaming.pinned * self.slots.count))
            try:
                self.preload(most_used(spec, uses, count))
            except BaseException:
                self.close()
                raise
            self.pinned = count

    def attach_run(self, routes: NDArray[np.int64], counters: int, units: int) -> None:
        """Where the run keeps the counters of a layer's experts, and the units of down of each."""
        self.attach(lambda i: bool(kernel.finished(routes, counters, i, units)))

    def report(self, before: Mapping[str, float]) -> dict[str, Any]:
        """What happened since `totals` gave `before`, for people and programs."""
        since = {name: value - before[name] for name, value in self.totals().items()}
        spared = {name: since.pop(name) for name in ("swapped", "dropped", "stood_in")}
        found = {"expert_hits": since.pop("hits"), **since}
        if not self.streaming.exact:  # what is said here is not what the model says
            found |= {"approximate": True, **{f"experts_{name}": count for name, count in spared.items()}}
        return found | {
            "expert_slots": self.slots.count,
            "experts_pinned": self.pinned,
            "prefetch": self.prefetch_report(),
            "readers": self.reading.readers,
        }


def index_of(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> Index:
    """Where each expert lies, and behind a layer's experts their stand-ins, where there are any."""

    def segment(tensor: StoredTensor) -> Segment:
        kind = QUANTS.index(tensor.quant)
        return Segment(tensor.name, tensor.offset, tensor.nbytes, kind, tensor.sha256)

    return [
        [
            segment(tensors[name(layer, expert)])
            for name in (expert_name, stand_in_name)
            for expert in range(spec.experts)
            if name(layer, expert) in tensors
        ]
        if spec.has_experts(layer)
        else []
        for layer in range(spec.layers)
    ]


def expert_parts(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> Parts:
    """What streaming the experts of a model takes."""
    sizes = [page_padded(t.nbytes) for t in tensors.values() if t.role == "expert"]
    # Those of one token must fit, or two, so that one is read while the other is computed.
    return Parts("experts", len(sizes), sum(sizes), max(sizes), max(2, spec.active_experts))


def most_used(spec: ModelSpec, uses: NDArray[np.int64], count: int) -> list[Key]:
    """The experts used most, at most `count` of them. uses [L, E]."""
    order = np.argsort(-uses, axis=None, kind="stable").tolist()
    keys = (Key(*divmod(index, spec.experts)) for index in order)
    return [key for key in keys if spec.has_experts(key.group)][:count]


def warm_up() -> None:
    """Compile what the store calls beside the program."""
    ring.warm_up()
    kernel.finished(np.zeros(16, np.int64), 0, 0, 1)
