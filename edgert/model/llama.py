"""The Llama block and its relatives: norms before attention and before the feed-forward.

Touvron et al., 2023, arXiv:2302.13971, section 2.2.

They differ in what the ModelSpec and the tensors say (biases, norms of q and k, windows, LayerNorm, no
gate, positions in the embedding), not in the order of computation.
"""

from edgert.config import DOWN, QKV, UP
from edgert.model import latent, neurons
from edgert.model.builder import Builder
from edgert.state import Rows

BLOCK = "pre"
MODEL_TYPES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "granite", "stablelm"),
    *("starcoder2", "gpt2", "gpt_neox", "opt", "falcon"),
)


def layer(b: Builder, index: int) -> None:
    """One layer: hidden += attention(norm(hidden)); hidden += ffn(norm(hidden))."""
    attention(b, index)
    feed_forward(b, index)


def attention(b: Builder, index: int) -> None:
    """hidden += attention(norm(hidden))."""
    name = f"layers.{index}"
    x = b.norm(f"{name}.attention_norm", (index, QKV))
    b.linear(f"{name}.o", b.take_outliers(f"{name}.o", heads(b, index, x)), b.hidden, add=True)


def heads(b: Builder, index: int, x: Rows) -> Rows:
    """The outputs of all heads, side by side, for the input x."""
    name, spec = f"layers.{index}", b.spec
    if spec.latent:
        return latent.heads(b, index, x)
    b.take_outliers(f"{name}.attention", x)
    b.linear(f"{name}.q", x, b.q, last=False)
    b.linear(f"{name}.k", x, b.k, last=False)
    b.linear(f"{name}.v", x, b.v)
    if spec.joint_qk_norm:
        b.joint_norm(f"{name}.q_norm", b.q, spec.heads * spec.head_dim)
        b.joint_norm(f"{name}.k_norm", b.k, spec.kv_heads * spec.head_dim)
    b.heads(index)
    return b.attend(index)


def feed_forward(b: Builder, index: int) -> None:
    """hidden += ffn(norm(hidden))."""
    name, start = f"layers.{index}", b.position
    x = b.norm(f"{name}.ffn_norm", (index, UP))
    if b.spec.neurons:
        neurons.feed_forward(b, index, x)
    else:
        x = b.take_outliers(f"{name}.ffn", x)
        h = b.take_outliers(f"{name}.down", activations(b, index, x))
        b.linear(f"{name}.down", h, b.hidden, add=True)
    b.feed_forwards[index] = start, b.position


def activations(b: Builder, index: int, x: Rows) -> Rows:
    """What the feed-forward's last matrix meets, for the input x: act(gate x) * up x, or act(up x)."""
    name = f"layers.{index}"
    if b.spec.plain_ffn:
        b.linear(f"{name}.up", x, b.gate)
        return b.gated(f"{name}.down", b.gate, place=(index, DOWN))
    b.linear(f"{name}.gate", x, b.gate, last=False)
    b.linear(f"{name}.up", x, b.up)
    return b.gated(f"{name}.down", b.gate, b.up, (index, DOWN))
