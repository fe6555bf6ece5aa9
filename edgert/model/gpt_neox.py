"""Parallel blocks: attention and feed-forward read the same hidden rows (Wang and Komatsuzaki, GPT-J, 2021).

cohere, cohere2, gpt_neox, falcon, stablelm. Both have a norm of their own, or share one.
"""

from edgert.model.builder import Builder
from edgert.model.llama import activations, heads

BLOCK = "parallel"
MODEL_TYPES = ("cohere", "cohere2", "gpt_neox", "falcon", "stablelm")


def layer(b: Builder, index: int) -> None:
    """One layer: hidden += attention(norm(hidden)) + ffn(norm(hidden))."""
    name = f"layers.{index}"
    x = b.norm(f"{name}.attention_norm")
    y = x if b.spec.shared_norm else b.second_norm(f"{name}.ffn_norm")
    b.linear(f"{name}.o", heads(b, index, x), b.hidden, add=True)
    b.linear(f"{name}.down", activations(b, index, y), b.hidden, add=True)
