"""Timing prompts and generation, as llama-bench does: tests pp512, tg128 and their like."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from edgert.engine import Engine
from edgert.errors import OptionError


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of a benchmark; field names are those of the JSON."""

    model: str
    size_bytes: int
    params: int
    threads: int
    test: str  # pp512: a prompt of 512 tokens; tg128: 128 tokens one by one; @d4096: after so many
    ts_mean: float  # tokens per second
    ts_sd: float


def run_tests(
    engine: Engine, prompt: int, generate: int, repeats: int, depth: int = 0
) -> Iterator[tuple[str, float, float]]:
    """(test, mean, standard deviation) in tokens per second, on random tokens, after a warm-up each.

    depth: tokens already in the cache before the timed ones.
    """
    forward = engine.forward
    room = forward.config.context
    if depth + max(prompt, generate) > room:
        raise OptionError(
            f"depth {depth} and {max(prompt, generate)} tokens do not fit in a context of {room}; "
            "give a larger --context or fewer tokens"
        )
    tokens = np.random.default_rng(0).integers(0, forward.spec.vocab, room).tolist()
    _feed(engine, tokens[:depth])
    suffix = f"@d{depth}" if depth else ""
    if prompt:
        yield (f"pp{prompt}{suffix}", *_rate(engine, depth, prompt, repeats, _feed, tokens))
    if generate:
        yield (f"tg{generate}{suffix}", *_rate(engine, depth, generate, repeats, _one_by_one, tokens))


def _rate(
    engine: Engine,
    depth: int,
    count: int,
    repeats: int,
    work: Callable[[Engine, list[int]], None],
    tokens: list[int],
) -> tuple[float, float]:
    rates = []
    for turn in range(repeats + 1):
        engine.forward.cache.rewind(depth)
        start = time.perf_counter()
        work(engine, tokens[depth : depth + (count if turn else min(count, 8))])
        rates.append(count / (time.perf_counter() - start))
    engine.forward.cache.rewind(depth)
    timed = rates[1:]  # the first was the warm-up
    return float(np.mean(timed)), float(np.std(timed, ddof=1)) if repeats > 1 else 0.0


def _feed(engine: Engine, tokens: list[int]) -> None:
    size = engine.forward.config.chunk
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        engine.forward.run(chunk, outputs=[len(chunk) - 1])


def _one_by_one(engine: Engine, tokens: list[int]) -> None:
    for token in tokens:
        engine.forward.run([token], outputs=[0])
