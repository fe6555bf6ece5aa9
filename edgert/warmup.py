"""Compiling everything ahead of the first model, and finding how this machine's products are best cut."""

import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product

from edgert import tiling
from edgert.config import EngineConfig, ModelSpec, SamplingParams, Tiling
from edgert.experts import store
from edgert.kernels import operations
from edgert.model.forward import Forward
from edgert.model.shapes import random_weights
from edgert.neurons import store as neurons
from edgert.sampling import Sampler
from edgert.state import Weights

_LARGE = ModelSpec("llama", 1, 2048, 16, 4, 128, 16384, 32, 32, 1e-5, tied_embeddings=True)
"""One layer with 64 MiB of weights: more than a board's caches hold, little beside its memory."""
_ROUNDS = 9
"""Timings of each candidate; the least counts, for other work on the machine only ever adds time."""
_WORTH = 0.97
"""A candidate replaces the default if it takes less than this of its time: less than that is noise."""
_UNSURE = 0.03
"""By so much the second least time may exceed the least: on a busier machine nothing can be chosen."""


def warm_up() -> None:
    """Compile, or load from the cache, all that any model needs."""
    spec = ModelSpec("llama", 1, 32, 1, 1, 32, 32, 32, 32, 1e-5, tied_embeddings=True)
    forward = Forward(random_weights(spec, "q4"), EngineConfig(threads=1, context=32, chunk=8))
    logits = forward.run([1, 2], outputs=[1])
    Sampler(SamplingParams(), spec.vocab).choose(logits[0])
    forward.run([3, 4], parents=[-1, -1])
    forward.keep([1])  # of a tree of guesses
    forward.close()
    operations.addresses(operations.OPERATIONS)
    store.warm_up()
    neurons.warm_up()


def search(threads: int, spec: ModelSpec = _LARGE, rounds: int = _ROUNDS) -> Tiling | None:
    """The fastest of 17 tilings on this machine; a few seconds. No result depends on it.

    None where the machine is too busy to tell them apart.
    """
    weights, best = random_weights(spec, "q4"), Tiling()
    shapes = [replace(best, most=m, ahead=a) for m, a in product(tiling.MOST, tiling.AHEAD)]
    found = _fastest(weights, threads, shapes, (4, 8), rounds)
    if found is None:
        return None
    units = [replace(found, unit_bytes=size) for size in tiling.UNIT_BYTES]
    return _fastest(weights, threads, units, (1,), rounds)


def _fastest(
    weights: Weights, threads: int, candidates: list[Tiling], rows: tuple[int, ...], rounds: int
) -> Tiling | None:
    """The candidate with the least sum of the times for each number of rows; the first where none is worth
    a change."""
    times: dict[tuple[Tiling, int], list[float]] = {(c, count): [] for c in candidates for count in rows}
    with ExitStack() as stack:
        configs = [EngineConfig(threads, 32, max(rows), tiling=candidate) for candidate in candidates]
        forwards = [stack.enter_context(closing(Forward(weights, config))) for config in configs]
        for _ in range(rounds + 1):  # in turn, so that a drift of the machine meets all of them
            for candidate, forward in zip(candidates, forwards, strict=True):
                for count in rows:
                    forward.cache.rewind(0)
                    began = time.perf_counter()
                    forward.run([1] * count)
                    times[candidate, count].append(time.perf_counter() - began)
    least = [sorted(kept)[:2] for kept in times.values()]
    if statistics.median(second / first for first, second in least) > 1 + _UNSURE:
        return None
    sums = [sum(min(times[candidate, count]) for count in rows) for candidate in candidates]
    best = min(range(len(sums)), key=sums.__getitem__)
    return candidates[best] if sums[best] < _WORTH * sums[0] else candidates[0]
