"""A trained model's routing, recorded, and replayed by a model of another shape with random weights.

Random weights route at random, which no trained model does. So the routers become zero, and before each
token their bias is set to logits that choose what the trace says; the predictions (the next layer's router
on this layer's input) are replayed likewise, right or wrong as they were. A trace of fewer layers and
experts is widened: layers and tokens are taken in turn, and each expert stands for as many of ours as make
the number up, so that shares of reuse and of right guesses stay those measured.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.experts import open_streamed
from edgert.flash import Streaming
from edgert.format import ErtFile, StoredTensor
from edgert.format.layout import page_padded
from edgert.kernels import program
from edgert.model.forward import Forward
from edgert.planner import plan
from edgert.state import Weights
from edgert.tokenizer import Tokenizer


def record(model: Path, text: Path, last: int, out: Path) -> dict[str, float]:
    """Write the experts chosen, and those predicted, of every token and layer of the last lines of a text.

    Gives the shares of experts that the token before chose too, and of predictions that were right.
    """
    with ErtFile.open(model) as file:
        config = plan(file.spec, file.size, context=file.spec.context, threads=1)
        count = sum(t.role == "expert" for t in file.tensors.values())
        weights, store = open_streamed(file, count, Streaming(prefetch="on"))
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        spec, forward = file.spec, Forward(weights, config, store)
    chosen: list[list[list[int]]] = []
    ahead: list[list[list[int]]] = []
    try:
        for line in text.read_text("utf-8").splitlines()[-last:]:
            forward.cache.rewind(0)
            body = json.loads(line)["text"] if line.startswith("{") else line
            for token in tokenizer.encode(body)[: spec.context - 1]:
                forward.run([token])
                newest = store.ring.number
                found = [store.ring.request(newest - i) for i in reversed(range(spec.layers))]
                by_weight = [r.members for r in found]
                chosen.append(by_weight)
                ahead.append([[], *([list(r.ahead) for r in found[:-1]])])
    finally:
        forward.close()
    k = spec.active_experts
    taken = np.array(chosen, np.int16)
    guesses = np.array([[g if len(g) == k else [-1] * k for g in row] for row in ahead], np.int16)
    right = (guesses[:, 1:, :, None] == taken[:, 1:, None, :]).any(-1).mean()
    again = (taken[1:, :, :, None] == taken[:-1, :, None, :]).any(-1).mean()
    np.savez_compressed(out, chosen=taken, ahead=guesses, experts=spec.experts)
    print(f"{len(taken)} tokens, {spec.layers} layers of {k} of {spec.experts} experts -> {out}")
    print(f"of the last token again {again:.0%}, of the predictions right {right:.0%}", flush=True)
    return {"tokens": len(taken), "again": float(again), "predicted": float(right)}


class Replay:
    """Makes a model route as a trace says, by the biases of routers that are zero."""

    def __init__(self, weights: Weights, trace: dict[str, NDArray[np.int16]]) -> None:
        spec = weights.spec
        size = page_padded(spec.experts * 4)
        at = page_padded(weights.data.size)
        self.data = np.zeros(at + 2 * spec.layers * size, np.uint8)
        self.data[: weights.data.size] = weights.data
        weights.data = self.data[: weights.data.size]  # the first copy goes: it would count as resident
        tensors = dict(weights.tensors)
        self.bias: list[NDArray[np.float32]] = []  # [E] of each layer, then of each layer's prediction
        self.places: list[int] = []
        for i in range(2 * spec.layers):
            start = at + i * size
            self.places.append(start)
            self.bias.append(self.data[start : start + spec.experts * 4].view(np.float32))
        for layer in range(spec.layers):
            router = tensors[f"layers.{layer}.router"]
            self.data[router.offset : router.offset + router.nbytes] = 0
            name = f"layers.{layer}.router_bias"
            tensors[name] = StoredTensor(
                name, "vector", (spec.experts,), "f32", "flat", self.places[layer], spec.experts * 4, ""
            )
        self.weights = Weights(spec, self.data, tensors)
        self._trace, self._spec = trace, spec

    def attach(self, forward: Forward) -> None:
        """Give the predicting products their own biases: they share the routers' otherwise."""
        code = forward.code
        column = 3 + program.FIELDS[program.MATMUL].index("bias")
        layers = self._spec.layers
        own = dict(zip(self.places[:layers], self.places[layers:], strict=True))
        for row in code:
            if row[0] == program.MATMUL and row[1] == program.FORESEEN:
                row[column] = own[int(row[column])]

    def set(self, token: int) -> None:
        """Route as token number `token` of the trace."""
        layers, experts = self._spec.layers, self._spec.experts
        for i in range(layers):
            for kind, bias in (("chosen", self.bias[i]), ("ahead", self.bias[layers + i])):
                ours = picks(self._spec, self._trace, kind, token, i)
                bias[:] = 0
                bias[ours] = np.linspace(9, 8, len(ours), dtype=np.float32)
        assert experts == len(self.bias[0])


def picks(
    spec: ModelSpec, trace: dict[str, NDArray[np.int16]], kind: str, token: int, layer: int
) -> NDArray[np.int64]:
    """Experts of `spec` that stand for those which the trace says were "chosen", or predicted ("ahead")."""
    values = trace[kind]
    tokens, layers, active = values.shape
    wide = spec.experts // int(trace["experts"])
    # Layers beyond the trace's own repeat its text from another place.
    turn, own = divmod(layer, layers)
    shift = turn * (tokens // max(1, spec.layers // layers))
    theirs = values[(token + shift) % tokens, own].astype(np.int64)
    if theirs[0] < 0:  # nothing is predicted for a first layer of the trace: what was there before
        theirs = trace["chosen"][(token + shift - 1) % tokens, own].astype(np.int64)
    per = -(-spec.active_experts // active)
    found = (theirs[:, None] * wide + (np.arange(per) * (wide // per) + layer) % wide).reshape(-1)
    return found[: spec.active_experts]
