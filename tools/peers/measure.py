"""Driving the runtimes' processes: which tests, in which order, round by round."""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .protocol import ROWS_DEPTH
from .results import LLAMA_CPP, OURS, Group, Timing

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
SETTLE = 0.1
"""Seconds between two measurements: threads of the last runtime that still spin go to sleep."""
IDLE_SECONDS = 1.0
"""How long idle processes are watched."""
CHECKED_LENGTHS = (32, 64, 100, 200)
SAME_MODEL = 0.97
"""Least correlation of two runtimes' logits, over some prompts, that shows the same weights: two 4-bit
roundings of the bundled model stay above 0.99, with the rows of q and k out of order they fall to 0.92."""


@dataclass(frozen=True, slots=True)
class Test:
    """A request and what it is called."""

    key: str
    label: str
    request: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tokens each test computes. `depth` 0: no test deep in the context.

    stream: whether to read memory too, for a model that is larger than the caches.
    """

    prompt: int
    generate: int
    depth: int
    rows: tuple[int, ...]
    stream: bool

    def context(self) -> int:
        """Positions needed, in whole blocks of 64, and one more: onnxruntime-genai refuses the last."""
        most = max(
            self.prompt,
            self.depth + self.generate,
            max(CHECKED_LENGTHS),
            ROWS_DEPTH + max(self.rows, default=0),
        )
        return math.ceil((most + 1) / 64) * 64

    def blocks(self) -> list[list[Test]]:
        """Tests whose rounds are interleaved; the deep one apart, since the others rewind its context."""
        prompt, generate, depth = str(self.prompt), str(self.generate), str(self.depth)
        tests = [
            Test("pp", f"pp{prompt}", ("pp", prompt), self.prompt),
            Test("tg", f"tg{generate}", ("tg", generate, "0"), self.generate),
            *([Test("stream", "streaming read", ("stream",), 0)] if self.stream else []),
            Test("gen", f"tg{generate} with sampling", ("gen", generate), self.generate),
            *(Test(f"rows{n}", f"forward of {n} rows", ("rows", str(n)), n) for n in self.rows),
        ]
        deep = Test("tg_deep", f"tg{generate}@d{depth}", ("tg", generate, depth), self.generate)
        return [tests, [deep]] if self.depth else [tests]


class Worker:
    """A runtime's process. A context manager."""

    def __init__(self, python: str, module: str, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", f"peers.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
            )

    def ask(self, *words: str) -> Any:
        """The answer to a request; RuntimeError where it failed or the process ended."""
        assert self._process.stdin and self._process.stdout
        print(shlex.join(words), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended at {' '.join(words)}; its log is {self._log}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"{' '.join(words)}: {answer['error']}; the log is {self._log}")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it holds nothing worth saving
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Runtime:
    """How to start a runtime's process, and the model as it reads it."""

    name: str
    python: str
    module: str
    file: Path


@contextmanager
def loaded(
    runtimes: list[Runtime], threads: int, context: int, logs: Path
) -> Iterator[tuple[dict[str, Worker], dict[str, Any]]]:
    """The workers by runtime, each with its model loaded, and what each says of itself."""
    with ExitStack() as stack:
        workers, infos = {}, {}
        for runtime in runtimes:
            worker = Worker(runtime.python, runtime.module, logs / f"{runtime.name}.log")
            workers[runtime.name] = stack.enter_context(worker)
            infos[runtime.name] = worker.ask("load", str(runtime.file), str(threads), str(context))
        yield workers, infos


def run_group(
    model: str,
    threads: int,
    workers: Mapping[str, Worker],
    infos: Mapping[str, Any],
    counts: Counts,
    rounds: int,
) -> Group:
    """All tests, `rounds` times after one round that is not counted."""
    timings = []
    for tests in counts.blocks():
        known = [(test, [n for n, i in infos.items() if test.request[0] in i["commands"]]) for test in tests]
        block = [_timing(test, names, infos) for test, names in known]
        for turn in range(rounds + 1):
            _progress(f"{model}, {threads} threads, {tests[0].label} ...: round {turn} of {rounds}")
            for (test, names), timing in zip(known, block, strict=True):
                for name in names:
                    time.sleep(SETTLE)
                    seconds = workers[name].ask(*test.request)
                    if turn:
                        timing.seconds[name].append(seconds)
        timings += block
    return Group(model, threads, idle_cpu(workers), timings)


def _timing(test: Test, names: list[str], infos: Mapping[str, Any]) -> Timing:
    if test.key == "stream":
        nbytes = {name: infos[name]["stream_bytes"] for name in names}
    elif test.key in ("tg", "tg_deep", "gen"):  # one by one: each token reads the model
        nbytes = {name: infos[name]["weight_bytes"] * test.tokens for name in names}
    else:
        nbytes = {}
    return Timing(test.key, test.label, test.tokens, nbytes, {name: [] for name in names})


def idle_cpu(workers: Mapping[str, Worker]) -> dict[str, float]:
    """Cores used by each process while nothing is asked of it: an idle runtime must not disturb another."""
    time.sleep(SETTLE)
    before = {name: worker.ask("cpu") for name, worker in workers.items()}
    time.sleep(IDLE_SECONDS)
    return {name: (worker.ask("cpu") - before[name]) / IDLE_SECONDS for name, worker in workers.items()}


def agreement(workers: Mapping[str, Worker]) -> float:
    """Least correlation of edgert's and llama.cpp's logits; RuntimeError where it is low."""
    found = 1.0
    for length in CHECKED_LENGTHS:
        ours, theirs = (workers[name].ask("logits", str(length)) for name in (OURS, LLAMA_CPP))
        found = min(found, statistics.correlation(ours, theirs))
    if not found > SAME_MODEL:
        raise RuntimeError(f"the logits correlate by {found:.3f}, expected over {SAME_MODEL}: not one model")
    return found


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
