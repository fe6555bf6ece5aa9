"""The Llama block and its relatives: llama, mistral, qwen2, qwen3 (Touvron et al., 2023).

They differ in what the ModelSpec and the tensors say (biases, norms of q and k, windows), not in
the order of computation.
"""

from edgert.model import neurons
from edgert.model.builder import Builder

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def layer(b: Builder, index: int) -> None:
    """One layer: hidden += attention(norm(hidden)); hidden += ffn(norm(hidden))."""
    attention(b, index)
    feed_forward(b, index)


def attention(b: Builder, index: int) -> None:
    """hidden += attention(norm(hidden))."""
    name, spec = f"layers.{index}", b.spec
    x = b.norm(f"{name}.attention_norm")
    b.linear(f"{name}.q", x, b.q, last=False)
    b.linear(f"{name}.k", x, b.k, last=False)
    b.linear(f"{name}.v", x, b.v)
    if spec.joint_qk_norm:
        b.joint_norm(f"{name}.q_norm", b.q, spec.heads * spec.head_dim)
        b.joint_norm(f"{name}.k_norm", b.k, spec.kv_heads * spec.head_dim)
    b.heads(index)
    b.linear(f"{name}.o", b.attend(index), b.hidden, add=True)


def feed_forward(b: Builder, index: int) -> None:
    """hidden += ffn(norm(hidden))."""
    name = f"layers.{index}"
    x = b.norm(f"{name}.ffn_norm")
    if b.spec.neurons:
        neurons.feed_forward(b, index, x)
        return
    b.linear(f"{name}.gate", x, b.gate, last=False)
    b.linear(f"{name}.up", x, b.up)
    b.linear(f"{name}.down", b.gated(f"{name}.down", b.gate, b.up), b.hidden, add=True)
