"""edgert: language models on small computers, exactly and at the speed of the memory bus.

import edgert
with edgert.load("model.ert") as model:
    print(model.generate("Once upon a time", max_tokens=64).text)
"""

from edgert.calibration import convert
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
