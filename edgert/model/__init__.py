"""Architectures and the one forward path.

An order of computation is one file with `BLOCK`, `MODEL_TYPES` and `layer`, named here; what an architecture
differs in otherwise is in converters/architectures.
"""

from collections.abc import Callable

from edgert.config import ModelSpec
from edgert.errors import UnsupportedError
from edgert.model import gemma2, gpt_neox, llama, mixtral, olmo2
from edgert.model.builder import Builder

_ORDERS = (llama, mixtral, gemma2, olmo2, gpt_neox)


def layer_of(spec: ModelSpec) -> Callable[[Builder, int], None]:
    """The function that writes one layer of this architecture."""
    for module in _ORDERS:
        if spec.architecture in module.MODEL_TYPES and spec.block == module.BLOCK:
            layer: Callable[[Builder, int], None] = module.layer
            return layer
    known = ", ".join(dict.fromkeys(name for module in _ORDERS for name in module.MODEL_TYPES))
    raise UnsupportedError(
        f"architecture {spec.architecture!r} with norms {spec.block!r} is not supported; supported: {known}"
    )
