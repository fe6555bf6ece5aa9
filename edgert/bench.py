"""Timing prompts and generation, as llama-bench does: tests pp512, tg128 and their like."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgert.config import SamplingParams
from edgert.engine import Engine
from edgert.errors import OptionError
from edgert.sampling import Sampler


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


def token_time(engine: Engine, tokens: int) -> tuple[float, float]:
    """(seconds of a token, the fraction of it outside compiled code), greedy sampling included: medians."""
    forward = engine.forward
    engine.start([0], Sampler(SamplingParams(), forward.spec.vocab))
    times, outside = [], []
    for _ in range(tokens):
        began, kernels = time.perf_counter(), forward.team.seconds
        engine.step()
        whole = time.perf_counter() - began
        times.append(whole)
        outside.append(1 - (forward.team.seconds - kernels) / whole)
    forward.cache.rewind(0)
    return float(np.median(times)), float(np.median(outside))


def run_tests(
    engine: Engine,
    prompt: int,
    generate: int,
    repeats: int,
    depth: int = 0,
    rows: Sequence[int] = (),
) -> Iterator[tuple[str, float, float]]:
    """(test, mean, standard deviation) in tokens per second, on random tokens, after a warm-up each.

    depth: tokens already in the cache before the timed ones. rows: forwards of so many rows, each with its
    logits, as the check of a token tree is; named fw1, fw2, ...
    """
    forward = engine.forward
    room = forward.config.context
    most = max(prompt, generate, *rows)
    if depth + most > room:
        raise OptionError(
            f"depth {depth} and {most} tokens do not fit in a context of {room}; "
            "give a larger --context or fewer tokens"
        )
    tokens = np.random.default_rng(0).integers(0, forward.spec.vocab, room).tolist()
    _feed(engine, tokens[:depth])
    suffix = f"@d{depth}" if depth else ""
    if prompt:
        yield (f"pp{prompt}{suffix}", *_rate(engine, depth, prompt, repeats, _feed, tokens))
    if generate:
        yield (f"tg{generate}{suffix}", *_rate(engine, depth, generate, repeats, _one_by_one, tokens))
    # In turn, so that a drift of the machine meets all of them.
    rates: dict[int, list[float]] = {count: [] for count in rows}
    for turn in range(repeats + 1):
        for count, kept in rates.items():
            engine.forward.cache.rewind(depth)
            start = time.perf_counter()
            for _ in range(_ROW_TURNS):
                engine.forward.run(tokens[depth : depth + count], outputs=range(count))
                engine.forward.cache.rewind(depth)
            if turn:
                kept.append(_ROW_TURNS * count / (time.perf_counter() - start))
    for count, kept in rates.items():
        yield f"fw{count}{suffix}", *_summary(kept)


_ROW_TURNS = 4
"""Forwards of some rows in one timing: one is too short to be timed well with a small model."""


def _summary(rates: list[float]) -> tuple[float, float]:
    return float(np.mean(rates)), float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0


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
    return _summary(rates[1:])  # the first was the warm-up


def _feed(engine: Engine, tokens: list[int]) -> None:
    size = engine.forward.config.chunk
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        engine.forward.run(chunk, outputs=[len(chunk) - 1])


def _one_by_one(engine: Engine, tokens: list[int]) -> None:
    for token in tokens:
        engine.forward.run([token], outputs=[0])
