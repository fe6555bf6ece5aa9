"""From the tensors of a checkpoint to one for each of ours: what is fused, transposed or in another order."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.converters.architectures.names import LAYERS, source_name
from edgert.converters.safetensors_source import SourceTensor

Rows = NDArray[np.int64]
ROTATED: Final = frozenset({"q", "q_bias", "k", "k_bias"})

T = TypeVar("T", bound="Pickable")


class Pickable(Protocol):
    """A tensor of any source, of which rows can be taken."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""

    @property
    def readable(self) -> bool:
        """Whether it is of a type that we read."""

    def pick(self: T, rows: Rows) -> T:
        """Some rows of a matrix, or values of a vector, in another order."""


class Cut(Protocol):
    """Tensors of ours that lie in the rows of one of a checkpoint."""

    @property
    def total(self) -> int:
        """Rows of that one."""

    def parts(self) -> dict[str, Rows]:
        """Ours, and the rows of each; called for a tensor that has so many rows."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """Ours one after another."""

    sizes: Mapping[str, int]

    @property
    def total(self) -> int:
        """See Cut."""
        return sum(self.sizes.values())

    def parts(self) -> dict[str, Rows]:
        """See Cut."""
        ends = list(accumulate(self.sizes.values()))
        return {
            name: np.arange(end - size, end)
            for (name, size), end in zip(self.sizes.items(), ends, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Grouped:
    """q, k and v where each group of query heads is followed by its key head, and that by its value head."""

    heads: int
    kv_heads: int
    head_dim: int
    suffix: str = ""

    @property
    def total(self) -> int:
        """See Cut."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def parts(self) -> dict[str, Rows]:
        """See Cut."""
        group = self.heads // self.kv_heads
        rows = np.arange(self.total).reshape(self.kv_heads, group + 2, self.head_dim)
        parts = {"q": rows[:, :group], "k": rows[:, group], "v": rows[:, group + 1]}
        return {name + self.suffix: part.reshape(-1) for name, part in parts.items()}


@dataclass(frozen=True, slots=True)
class PerHead:
    """Ours in every head in turn, `sizes` rows of each."""

    heads: int
    sizes: Mapping[str, int]
    neighbours: str = ""  # the one whose rotary pairs are neighbours

    @property
    def total(self) -> int:
        """See Cut."""
        return self.heads * sum(self.sizes.values())

    def parts(self) -> dict[str, Rows]:
        """See Cut."""
        rows = np.arange(self.total).reshape(self.heads, -1)
        cuts = np.split(rows, list(accumulate(self.sizes.values()))[:-1], axis=1)
        found = {name: part.reshape(-1) for name, part in zip(self.sizes, cuts, strict=True)}
        if self.neighbours:
            size = self.sizes[self.neighbours]
            found[self.neighbours] = found[self.neighbours][halves(self.heads, size, size)]
        return found


@dataclass(frozen=True, slots=True)
class Shifted:
    """One of ours behind some rows that are never used."""

    name: str
    unused: int
    size: int

    @property
    def total(self) -> int:
        """See Cut."""
        return self.unused + self.size

    def parts(self) -> dict[str, Rows]:
        """See Cut."""
        return {self.name: np.arange(self.unused, self.total)}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint lays out what others store one matrix at a time."""

    names: Mapping[str, str] = field(default_factory=dict)  # where they differ from Llama's
    layers: str = LAYERS  # what opens the name of every tensor of a layer
    base: str = ""  # opens all names but that of the output matrix, where a checkpoint may leave it out
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # as granitemoe.FUSED
    cuts: Mapping[str, Cut] = field(default_factory=dict)  # by the name of a tensor in its layer
    transposed: frozenset[str] = frozenset()  # matrices stored as [K, N], by the name in their layer
    interleaved: bool = False  # rotary pairs are neighbours (2i, 2i + 1), not the halves (i, i + r/2)
    renamed: Mapping[str, str] = field(default_factory=dict)  # later names of some, and ours for them
    prefixes: Mapping[str, str] = field(default_factory=dict)  # what opens names there, and here
    # What none of these describes: the tensors of a folder to those with each of ours by itself.
    expanded: Callable[[Mapping[str, SourceTensor], ModelSpec], Mapping[str, SourceTensor]] | None = None
    foreign: tuple[str, ...] = ()  # what opens the names of tensors that belong to another model
    ignored: tuple[str, ...] = ()  # ends of names of buffers that are no weights

    def source_name(self, name: str) -> str:
        """The name in the checkpoint, after cutting, of a tensor of ours or of one matrix of an expert."""
        return source_name(name, self.names, self.layers)

    def split(self, tensors: Mapping[str, T], spec: ModelSpec) -> dict[str, T]:
        """The tensors with each of ours by itself, under its `source_name`, and rows in our order."""
        found = dict(self._cut(tensors))
        if self.interleaved:
            for layer in range(spec.layers):
                for part in ROTATED:
                    name = self.source_name(f"layers.{layer}.{part}")
                    tensor = found.get(name)
                    heads = spec.heads if part.startswith("q") else spec.kv_heads
                    if tensor is not None and tensor.shape[:1] == (heads * spec.head_dim,):
                        found[name] = tensor.pick(halves(heads, spec.head_dim, spec.rotated))
        return found

    def _cut(self, tensors: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        for name, tensor in tensors.items():
            layer, part = self._place(name)
            cut = self.cuts.get(part)
            if cut is None or not tensor.readable or tensor.shape[:1] != (cut.total,):
                yield name, tensor
                continue
            for ours, rows in cut.parts().items():
                yield self.source_name(f"layers.{layer}.{ours}" if layer else ours), tensor.pick(rows)

    def _place(self, name: str) -> tuple[str, str]:
        """The layer of a tensor and its name there; "" and its whole name for one of no layer."""
        number, dot, part = name.removeprefix(self.layers).partition(".")
        inside = name.startswith(self.layers) and dot and number.isdecimal()
        return (number, part) if inside else ("", name)

    def untangled(self, tensors: Mapping[str, SourceTensor], spec: ModelSpec) -> dict[str, SourceTensor]:
        """The tensors of a folder as `split` takes them: each [N, K], and one for each expert's matrix."""
        expanded = self.expanded(tensors, spec) if self.expanded else tensors
        return dict(self._untangled(self._with_base(expanded), spec))

    def _untangled(
        self, tensors: Iterable[tuple[str, SourceTensor]], spec: ModelSpec
    ) -> Iterator[tuple[str, SourceTensor]]:
        for name, tensor in tensors:
            layer, part = self._place(name)
            if part in self.transposed and len(tensor.shape) == 2:
                yield name, tensor.transpose()
            elif part in self.experts and tensor.readable:
                yield from self._cut_experts(name, tensor, layer, self.experts[part], spec)
            else:
                yield name, tensor

    def _with_base(self, tensors: Mapping[str, SourceTensor]) -> Iterator[tuple[str, SourceTensor]]:
        named = any(name.startswith(self.base) for name in tensors)
        for found, tensor in tensors.items():
            name = self.renamed.get(found, found)
            prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
            name = self.prefixes.get(prefix, "") + name.removeprefix(prefix)
            if not name.endswith(self.ignored) and not (self.foreign and name.startswith(self.foreign)):
                yield name if named or name == "lm_head.weight" else self.base + name, tensor

    def _cut_experts(
        self, name: str, tensor: SourceTensor, layer: str, matrices: tuple[str, ...], spec: ModelSpec
    ) -> Iterator[tuple[str, SourceTensor]]:
        """One tensor for each matrix of a stack [E, rows, columns], in whose rows `matrices` lie."""
        width, inner = spec.width, spec.expert_width
        rows, columns = (width, inner) if matrices == ("experts.down",) else (inner, width)
        if tensor.shape != (spec.experts, len(matrices) * rows, columns):
            yield name, tensor
            return
        for expert in range(spec.experts):
            for j, matrix in enumerate(matrices):
                own = self.source_name(f"layers.{layer}.{matrix.replace('.', f'.{expert}.')}")
                yield own, tensor.part((expert * len(matrices) + j) * rows, rows, columns)


def halves(heads: int, head_dim: int, rotated: int) -> Rows:
    """Where rows of q or k lie in a checkpoint whose rotary pairs are neighbours.

    Ours keep the first of every pair of a head, then the second, then what is not rotated; scores do not
    depend on the order of dimensions that q and k share (Su et al., arXiv:2104.09864, section 3.2.2).
    """
    head = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, head_dim)])
    rows: Rows = (np.arange(heads)[:, None] * head_dim + head).reshape(-1)
    return rows
