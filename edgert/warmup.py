"""Compiling everything ahead of the first model."""

from edgert.config import EngineConfig, ModelSpec, SamplingParams
from edgert.model.forward import Forward
from edgert.model.shapes import random_weights
from edgert.sampling import Sampler


def warm_up() -> None:
    """Compile, or load from the cache, all that any model needs: one entry serves every model."""
    spec = ModelSpec("llama", 1, 32, 1, 1, 32, 32, 32, 32, 1e-5, tied_embeddings=True)
    forward = Forward(random_weights(spec, "q4"), EngineConfig(threads=1, context=32, chunk=8))
    logits = forward.run([1, 2], outputs=[1])
    Sampler(SamplingParams(), spec.vocab).choose(logits[0])
    forward.close()
