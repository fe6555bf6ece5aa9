"""edgert: language models on small computers, exactly and at the speed of the memory bus.

import edgert
with edgert.load("model.ert") as model:
    print(model.generate("Once upon a time", max_tokens=64).text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgert.calibration.convert import convert
    from edgert.config import ModelSpec, QuantSpec, SamplingParams
    from edgert.errors import EdgertError
    from edgert.events import Completion, TokenEvent
    from edgert.flash import Streaming
    from edgert.handoff.setup import HandoffConfig
    from edgert.runtime import Model, load

__all__ = [
    "Completion",
    "EdgertError",
    "HandoffConfig",
    "Model",
    "ModelSpec",
    "QuantSpec",
    "SamplingParams",
    "Streaming",
    "TokenEvent",
    "convert",
    "load",
]
__version__ = "0.1.0"

# Imported when first used: numba alone takes a quarter of a second, and the converters as much, which
# neither `edgert --help` nor a program that only runs a model should wait for.
_HOMES = {
    "Completion": "edgert.events",
    "EdgertError": "edgert.errors",
    "HandoffConfig": "edgert.handoff.setup",
    "Model": "edgert.runtime",
    "ModelSpec": "edgert.config",
    "QuantSpec": "edgert.config",
    "SamplingParams": "edgert.config",
    "Streaming": "edgert.flash",
    "TokenEvent": "edgert.events",
    "convert": "edgert.calibration.convert",
    "load": "edgert.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgert' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # so that this is asked once
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
