"""The buffers of latent attention, between a layer's input and its one key and value for all heads."""

from dataclasses import replace
from typing import Final

from edgert.config import ModelSpec
from edgert.state import Layout, Rows

LATENT_EPS: Final = 1e-6
"""Of the norms of latents: DeepSeek's code has it there whatever the configuration says of other norms."""


class Compression:
    """One set for all layers; r dimensions of a head are rotated, n are not, R is the latent's width."""

    def __init__(self, spec: ModelSpec, rows: int, layout: Layout) -> None:
        self.query = layout.rows(rows, spec.query_latent, quantized=True)  # [T, query latent]
        self.latent = layout.rows(rows, spec.latent)  # [T, R] before its norm
        self.plain = by_head(layout, rows, spec.heads, spec.plain_dim)  # [T, H*n], each head quantised alone
        self.values = layout.rows(rows, spec.heads * spec.value_dim, quantized=True)  # [T, H*v]


def by_head(layout: Layout, rows: int, heads: int, size: int) -> list[Rows]:
    """A buffer [rows, heads * size], `size` in whole groups, as one for each head (see `columns`)."""
    return columns(layout.rows(rows, heads * size, quantized=True), rows, heads, size)


def columns(x: Rows, rows: int, heads: int, size: int) -> list[Rows]:
    """The columns of each head of a buffer of `rows` rows, `size` in whole groups: floats where they are,
    quantised rows by themselves, one head's behind another's, as a matrix product takes them."""
    groups = size // 32
    return [
        replace(x, at=x.at + h * size, groups=groups, quantized=x.quantized + h * rows * groups)
        for h in range(heads)
    ]
