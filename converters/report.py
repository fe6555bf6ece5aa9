"""What a conversion tells its caller: progress while it runs, a table when it is done."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgert.config import ModelSpec, Quant


class Progress(Protocol):
    """Called after each piece of a tensor is written, and never from another thread."""

    def __call__(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """`done_bytes` of the `total_bytes` of all tensors are in the file; the last came from `name`."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One row of the table."""

    name: str
    shape: tuple[int, ...]
    source_type: str  # as the source calls it: BF16, Q4_K; "" for what was computed
    quant: Quant
    nbytes: int  # stored, without page padding
    relative_error: float  # RMS of the rounding error over RMS of the weights; 0 for exact


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was written and what it cost."""

    path: Path
    spec: ModelSpec  # of the model in it
    tensors: tuple[TensorReport, ...]  # in the order of the file, tokenizer left out
    file_bytes: int
    seconds: float
    peak_rss_bytes: int  # of the whole process since it started, not of the conversion alone

    @property
    def parameters(self) -> int:
        """Weights in the model: values, not bytes. The rotary frequencies are not learned."""
        return sum(math.prod(t.shape) for t in self.tensors if not t.name.endswith("rope_frequencies"))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all tensors, scales and block padding included, per weight."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / self.parameters
