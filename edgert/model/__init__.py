"""Architectures and the one forward path.

A new architecture is one file with `MODEL_TYPES` and `layer`, named here, and its entry in
converters/architectures.py.
"""

from collections.abc import Callable

from edgert.errors import UnsupportedError
from edgert.model import llama, mixtral
from edgert.model.builder import Builder

_ARCHITECTURES = (llama, mixtral)


def layer_of(architecture: str) -> Callable[[Builder, int], None]:
    """The function that writes one layer of this architecture."""
    for module in _ARCHITECTURES:
        if architecture in module.MODEL_TYPES:
            layer: Callable[[Builder, int], None] = module.layer
            return layer
    known = ", ".join(name for module in _ARCHITECTURES for name in module.MODEL_TYPES)
    raise UnsupportedError(f"architecture {architecture!r} is not supported; supported: {known}")
