"""Blocks with a norm before and behind each part: gemma2, gemma3_text, glm4 (Gemma Team, arXiv:2408.00118).

Their other peculiarities (soft caps, local and global layers, gains of 1 + w) are in the ModelSpec and the
tensors.
"""

from edgert.model.builder import Builder
from edgert.model.llama import activations, heads

BLOCK = "around"
MODEL_TYPES = ("gemma2", "gemma3_text", "glm4")


def layer(b: Builder, index: int) -> None:
    """One layer: hidden += norm(attention(norm(hidden))); hidden += norm(ffn(norm(hidden)))."""
    name = f"layers.{index}"
    x = b.norm(f"{name}.attention_norm")
    b.linear(f"{name}.o", heads(b, index, x), b.branch)
    b.add_normed(f"{name}.attention_post_norm")
    x = b.norm(f"{name}.ffn_norm")
    b.linear(f"{name}.down", activations(b, index, x), b.branch)
    b.add_normed(f"{name}.ffn_post_norm")
