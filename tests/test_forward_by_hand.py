"""The forward path against a model written by hand in float64."""

import math

import numpy as np
import pytest

from tests import kernel_inputs as inputs
from tests.forward_models import CASES, LENGTH, feed, forward, tokens_of, weights


class ByHand:
    """The Llama block in float64, from the paper and the meaning of the spec's fields."""

    def __init__(self, name: str) -> None:
        self.weights, self.spec = weights(name), CASES[name].spec

    def matrix(self, name: str) -> inputs.F64:
        tensor = self.weights.tensors[name]
        rows, columns = tensor.shape
        groups = -(-columns // 32)
        return inputs.stored_matrix(tensor.quant, self.weights.data, tensor.offset, groups, rows, columns)

    def vector(self, name: str) -> inputs.F64:
        tensor = self.weights.tensors[name]
        return np.frombuffer(
            self.weights.data[tensor.offset : tensor.offset + tensor.nbytes].tobytes(), "<f4"
        ).astype(np.float64)

    def linear(self, name: str, x: inputs.F64) -> inputs.F64:
        y = x @ self.matrix(name).T
        bias = f"{name}_bias"
        return y + self.vector(bias) if bias in self.weights.tensors else y

    def norm(self, gain: str, x: inputs.F64) -> inputs.F64:
        mean = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.spec.norm_eps) * self.vector(gain)

    def rotate(self, x: inputs.F64) -> inputs.F64:
        """x [T, heads, d]: the pair (i, i + d/2) turned by position * frequency[i]."""
        half = self.spec.head_dim // 2
        angle = np.arange(len(x))[:, None, None] * self.vector("rope_frequencies")
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def activate(self, x: inputs.F64) -> inputs.F64:
        positive = np.maximum(x, 0)
        return {
            "silu": lambda: x / (1 + np.exp(-x)),
            "relu": lambda: positive,
            "relu2": lambda: positive**2,
            "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        }[self.spec.activation]()

    def attention(self, layer: int, x: inputs.F64) -> inputs.F64:
        spec, name, count = self.spec, f"layers.{layer}", len(x)
        q = self.linear(f"{name}.q", x).reshape(count, spec.heads, spec.head_dim)
        k = self.linear(f"{name}.k", x).reshape(count, spec.kv_heads, spec.head_dim)
        v = self.linear(f"{name}.v", x).reshape(count, spec.kv_heads, spec.head_dim)
        if spec.joint_qk_norm:
            q = self.norm(f"{name}.q_norm", q.reshape(count, -1)).reshape(q.shape)
            k = self.norm(f"{name}.k_norm", k.reshape(count, -1)).reshape(k.shape)
        if spec.qk_norm:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        # The cache holds float16.
        q, k = self.rotate(q), self.rotate(k).astype(np.float16).astype(np.float64)
        v = v.astype(np.float16).astype(np.float64)
        out = np.zeros_like(q)
        window = spec.windows[layer] if spec.windows else 0
        for t in range(count):
            start = max(0, t + 1 - window) if window else 0
            for h in range(spec.heads):
                shared = h * spec.kv_heads // spec.heads
                scores = k[start : t + 1, shared] @ q[t, h] / math.sqrt(spec.head_dim)
                p = np.exp(scores - scores.max())
                out[t, h] = p @ v[start : t + 1, shared] / p.sum()
        return self.linear(f"{name}.o", out.reshape(count, -1))

    def experts(self, name: str, x: inputs.F64) -> inputs.F64:
        spec = self.spec
        scores = np.exp(self.linear(f"{name}.router", x))
        scores /= scores.sum(axis=1, keepdims=True)
        y = np.zeros_like(x)
        for t, row in enumerate(scores):
            best = sorted(range(spec.experts), key=lambda e: -row[e])[: spec.active_experts]
            total = sum(row[e] for e in best) if spec.normalized_routing else 1.0
            for e in best:
                y[t] += row[e] / total * self.expert(f"{name}.experts.{e}", x[t])
        if spec.shared_width:
            gate = self.activate(self.linear(f"{name}.shared_gate", x)) * self.linear(f"{name}.shared_up", x)
            weight = 1 / (1 + np.exp(-self.linear(f"{name}.shared_router", x)))
            y += weight * self.linear(f"{name}.shared_down", gate)
        return y

    def expert(self, name: str, x: inputs.F64) -> inputs.F64:
        """One row through the three matrices that lie in one tensor."""
        tensor, at, found = self.weights.tensors[name], self.weights.tensors[name].offset, []
        _, inner, width = tensor.shape
        for rows, columns in ((inner, width), (inner, width), (width, inner)):
            blocks, groups = -(-rows // 16), -(-columns // 32)
            found.append(inputs.stored_matrix(tensor.quant, self.weights.data, at, groups, rows, columns))
            at += blocks * groups * inputs.RECORD[tensor.quant]
        gate, up, down = found
        result: inputs.F64 = down @ (self.activate(gate @ x) * (up @ x))
        return result

    def logits(self, tokens: list[int], layers: int | None = None) -> inputs.F64:
        """Of the model, or of the exit after so many layers."""
        x = self.matrix("token_embedding")[tokens]
        for layer in range(self.spec.layers if layers is None else layers):
            name = f"layers.{layer}"
            x = x + self.attention(layer, self.norm(f"{name}.attention_norm", x))
            normed = self.norm(f"{name}.ffn_norm", x)
            if f"{name}.router" in self.weights.tensors:
                x = x + self.experts(name, normed)
                continue
            gate = self.activate(self.linear(f"{name}.gate", normed))
            x = x + self.linear(f"{name}.down", gate * self.linear(f"{name}.up", normed))
        output = "token_embedding" if self.spec.tied_embeddings else "output"
        if layers is None:
            return self.norm("output_norm", x) @ self.matrix(output).T
        n = self.norm(f"exits.{layers}.norm", x)
        z = n + n @ self.matrix(f"exits.{layers}.matrix").T
        return self.norm(f"exits.{layers}.output_norm", z) @ self.matrix(output).T


@pytest.mark.parametrize(
    "name",
    [
        *("gqa-f32-f16", "odd-f32-f16", "rich-f32-f16", "small-f32-f16", "rich-f16-f16"),
        *("experts-f32-f16", "one-expert-f32-f16"),
    ],
)
def test_logits_are_those_of_a_model_written_by_hand(name: str) -> None:
    tokens = tokens_of(name, 3, LENGTH)
    expected = ByHand(name).logits(tokens)
    with forward(name) as model:
        found = feed(model, tokens, [LENGTH - 7, 7])
    assert np.abs(expected).max() > 0.1  # not a model that says nothing
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["exits-f32-f16", "exits-f16-f16"])
def test_exits_are_those_of_a_lens_written_by_hand(name: str) -> None:
    tokens = tokens_of(name, 3, LENGTH)
    for layer in CASES[name].spec.exits:
        expected = ByHand(name).logits(tokens, layer)
        with forward(name) as model:
            found = model.run(tokens, layers=(0, layer), outputs=range(LENGTH)).copy()
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_the_tiny_models_are_not_degenerate() -> None:
    """Logits differ between tokens and depend on the first token: attention looks back."""
    for name in ("gqa-q4-f16", "odd-f32-f16"):
        tokens = tokens_of(name, 1, 12)
        with forward(name) as model:
            first = feed(model, tokens, [12])
            model.cache.rewind(0)
            second = feed(model, [(tokens[0] + 1) % 90, *tokens[1:]], [12])
        assert np.abs(first[-1] - second[-1]).max() > 1e-4
        assert np.ptp(first[-1]) > 0.1
