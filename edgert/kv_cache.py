"""The cache of keys and values: one region per sequence, layer and head, filled from the front."""

import numpy as np
from numpy.typing import NDArray

from edgert.config import KV_TYPES, EngineConfig, ModelSpec
from edgert.errors import ContextLengthError
from edgert.kernels import kv


class KvCache:
    """Keys and values of `config.sequences` sequences; `lengths` positions of each hold what was computed.

    Most runs have one sequence, and every method means that one unless told otherwise. The memory is
    reserved at once and touched only as it fills. Rewinding is forgetting: what lies behind a length is
    never read.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig) -> None:
        self.kind = KV_TYPES.index(config.kv)
        self.capacity = -(-config.context // 16) * 16
        self.limit = config.context  # positions of each sequence that may be used
        self.head_dim, self.value_dim = spec.head_dim, spec.value_width
        self.region_bytes = kv.region_bytes(self.kind, self.capacity, self.head_dim, self.value_dim)
        self.heads, self.first = spec.kv_heads, spec.first_layer
        self.layers = spec.last_layer - spec.first_layer
        self.sequence_bytes = self.layers * self.heads * self.region_bytes
        self.lengths = [0] * config.sequences
        self.data: NDArray[np.uint8] = np.zeros(config.sequences * self.sequence_bytes, np.uint8)

    @property
    def length(self) -> int:
        """Positions of the first sequence, or the only one."""
        return self.lengths[0]

    @length.setter
    def length(self, value: int) -> None:
        self.lengths[0] = value

    def layer(self, index: int) -> int:
        """The byte where a layer's first region starts, from the start of a sequence's."""
        return (index - self.first) * self.heads * self.region_bytes

    def room_for(self, count: int, sequence: int = 0) -> None:
        """Raise ContextLengthError unless `count` more positions fit."""
        if self.lengths[sequence] + count > self.limit:
            raise ContextLengthError(
                f"{self.lengths[sequence] + count} tokens do not fit in a context of {self.limit}: "
                "shorten the prompt, or load with a larger context"
            )

    def rewind(self, length: int, sequence: int = 0) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.lengths[sequence]} positions")
        self.lengths[sequence] = length

    def keep(self, slots: list[int], sequence: int = 0) -> None:
        """Make these slots, behind the length and ascending, the next positions (an accepted branch)."""
        start, size = sequence * self.sequence_bytes, (self.capacity, self.head_dim, self.value_dim)
        for target, source in enumerate(slots, self.lengths[sequence]):
            if source != target:
                for region in range(start, start + self.sequence_bytes, self.region_bytes):
                    kv.move(self.kind, self.data, region, *size, source, target)
        self.lengths[sequence] += len(slots)
