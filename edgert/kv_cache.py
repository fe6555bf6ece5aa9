"""The cache of keys and values: one region per layer and head, filled from the front."""

import numpy as np
from numpy.typing import NDArray

from edgert.config import KV_TYPES, EngineConfig, ModelSpec
from edgert.errors import ContextLengthError
from edgert.kernels import kv


class KvCache:
    """Keys and values of one sequence. `length` positions hold what was computed.

    The memory is reserved at once and touched only as it fills. Rewinding is forgetting: what lies
    behind `length` is never read.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig) -> None:
        self.kind = KV_TYPES.index(config.kv)
        self.capacity = -(-config.context // 16) * 16
        self.limit = config.context  # positions that may be used
        self.region_bytes = kv.region_bytes(self.kind, self.capacity, spec.head_dim)
        self.heads, self.head_dim, self.layers = spec.kv_heads, spec.head_dim, spec.layers
        self.length = 0
        self.data: NDArray[np.uint8] = np.zeros(spec.layers * spec.kv_heads * self.region_bytes, np.uint8)

    def layer(self, index: int) -> int:
        """The byte where a layer's first region starts."""
        return index * self.heads * self.region_bytes

    def room_for(self, count: int) -> None:
        """Raise ContextLengthError unless `count` more positions fit."""
        if self.length + count > self.limit:
            raise ContextLengthError(
                f"{self.length + count} tokens do not fit in a context of {self.limit}: "
                "shorten the prompt, or load with a larger context"
            )

    def rewind(self, length: int) -> None:
        """Forget everything from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: the cache holds {self.length} positions")
        self.length = length

    def keep(self, slots: list[int]) -> None:
        """Make these slots, behind `length` and ascending, the next positions (an accepted branch)."""
        for target, source in enumerate(slots, self.length):
            if source != target:
                for region in range(0, self.data.size, self.region_bytes):
                    kv.move(self.kind, self.data, region, self.capacity, self.head_dim, source, target)
        self.length += len(slots)
