"""Timing generation with and without a draft, on the same prompts, turn about."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.bench import BenchRow
from edgert.config import SamplingParams
from edgert.decoding import Commit
from edgert.engine import Engine
from edgert.format import ErtFile
from edgert.model.shapes import parameters
from edgert.planner import plan
from edgert.sampling import Sampler
from edgert.speculation import drafting
from edgert.state import Weights
from edgert.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, generated twice. Times are of decoding: after the first token, to the last."""

    tokens: tuple[int, ...]
    plain_s: float
    guessed_s: float
    stats: dict[str, Any]  # of the guessing run

    @property
    def speedup(self) -> float:
        """Plain time over guessing time."""
        return self.plain_s / self.guessed_s


def pairs(
    plain: Engine, guessing: Engine, prompts: Sequence[Sequence[int]], count: int, **sampling: Any
) -> Iterator[Pair]:
    """Generate up to `count` tokens after each prompt with both engines, which of them first by turns.

    Raises AssertionError should the tokens differ: that would be a fault of ours, not of the user's.
    """
    params = SamplingParams(**({"max_tokens": count, "seed": 1} | sampling))
    for turn, prompt in enumerate(prompts):
        results = {}
        for engine in (plain, guessing) if turn % 2 else (guessing, plain):
            # Both begin with an empty cache, as a fresh process would.
            engine.sequence.clear()
            results[engine] = generate(engine, prompt, params)
        (tokens, plain_s), (guessed, guessed_s) = results[plain], results[guessing]
        assert tokens == guessed, f"prompt {turn}: {guessed} with the draft, {tokens} without"
        if len(tokens) > 1:
            yield Pair(tokens, plain_s, guessed_s, guessing.report())


@dataclass(frozen=True, slots=True)
class DraftRow(BenchRow):
    """A line of a comparison: as of any benchmark, and what the draft did."""

    accepted_per_step: float = 1.0  # tokens per verification, over all prompts
    speedup: float = 1.0  # plain time over this one's, the median over prompts


def draft_rows(
    path: Path,
    draft: Sequence[str],
    texts: Sequence[str],
    prompt: int,
    count: int,
    repeats: int,
    tree: int | None,
    always: bool,
    options: dict[str, Any],
) -> Iterator[DraftRow]:
    """Two lines: plain generation and guessing, over the first `prompt` tokens of every text."""
    with ErtFile.open(path) as file, closing(open_pair(file, draft, tree, always, options)) as both:
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        prompts = [tokenizer.encode(text)[:prompt] for text in texts] * repeats
        found = list(pairs(both.plain, both.guessing, prompts, count))
        name = f"{file.spec.architecture} {path.stem}"
        size, weights, threads = file.size, parameters(file.spec), both.plain.forward.config.threads
        for test, times, accepted, speedup in (
            (f"tg{count}", [pair.plain_s for pair in found], 1.0, 1.0),
            (
                f"tg{count} {found[0].stats['draft']}",
                [pair.guessed_s for pair in found],
                accepted_per_step(found),
                statistics.median(pair.speedup for pair in found),
            ),
        ):
            rates = [(len(pair.tokens) - 1) / s for pair, s in zip(found, times, strict=True)]
            spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
            mean = sum(len(pair.tokens) - 1 for pair in found) / sum(times)
            yield DraftRow(name, size, weights, threads, test, mean, spread, accepted, speedup)


def accepted_per_step(found: Sequence[Pair]) -> float:
    """Tokens per verification over several runs."""
    steps = [pair.stats["verifications"] for pair in found]
    tokens = [pair.stats["accepted_per_step"] * count for pair, count in zip(found, steps, strict=True)]
    return float(sum(tokens) / max(1, sum(steps)))


class Both:
    """A plain engine and a guessing one over the same weights."""

    def __init__(self, plain: Engine, guessing: Engine) -> None:
        self.plain, self.guessing = plain, guessing

    def close(self) -> None:
        """End both."""
        self.plain.close()
        self.guessing.close()


def open_pair(
    file: ErtFile,
    draft: Sequence[str],
    tree: int | None,
    always: bool,
    options: dict[str, Any],
    learn: bool = False,
) -> Both:
    """Both engines of a file; options are those of `plan`."""
    shared = {name: options.get(name) for name in ("threads", "context")}
    made = drafting(file, draft, tree=tree, learn=learn, kv=options.get("kv", "f16"), **shared)
    config = plan(file.spec, file.size, **options, draft_bytes=made.nbytes)
    weights = Weights.of_file(file)
    return Both(Engine(weights, config), Engine(weights, config, made.decoder(file.spec, always)))


def generate(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[tuple[int, ...], float]:
    """(tokens, seconds from the first to the last)."""
    engine.start(prompt, Sampler(params, engine.forward.spec.vocab))
    ends, commits = engine.forward.spec.eos_ids, list[Commit]()
    began = 0.0
    while not _ended(commits, ends, params.max_tokens) and not engine.sequence.full:
        commits += engine.step()
        if commits and not began:
            began = time.perf_counter()
    return tuple(commit.choice.token for commit in commits), time.perf_counter() - began


def _ended(commits: list[Commit], ends: Sequence[int], most: int) -> bool:
    return len(commits) >= most or (bool(commits) and commits[-1].choice.token in ends)
