"""Blocks with norms behind attention and feed-forward alone: olmo2, olmo3, exaone4.

OLMo Team, 2025, arXiv:2501.00656.
"""

from edgert.model.builder import Builder
from edgert.model.llama import activations, heads

BLOCK = "post"
MODEL_TYPES = ("olmo2", "olmo3", "exaone4")


def layer(b: Builder, index: int) -> None:
    """One layer: hidden += norm(attention(hidden)); hidden += norm(ffn(hidden))."""
    name = f"layers.{index}"
    b.linear(f"{name}.o", heads(b, index, b.raw()), b.branch)
    b.add_normed(f"{name}.attention_post_norm")
    b.linear(f"{name}.down", activations(b, index, b.raw()), b.branch)
    b.add_normed(f"{name}.ffn_post_norm")
