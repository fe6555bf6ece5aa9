"""What a runtime's process is asked, and how each measurement is taken: the same code for all of them.

Requests are lines: `load FILE THREADS CONTEXT`, then `pp N`, `tg N DEPTH`, `rows N`, `gen N`,
`logits N`, `stream`, `cpu`. Every answer is one line of JSON. This module runs in every runtime's
environment, so it imports nothing but the standard library.
"""

import json
import os
import random
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

ROWS_DEPTH = 128
"""Tokens before a forward of a few rows: a tree is verified behind some text."""
ROWS_FORWARDS = 8
"""Forwards that one measurement of `rows` averages: one alone is over in some 30 ms."""
COMMANDS = ("pp", "tg", "rows", "gen", "logits", "stream")


class Runner(ABC):
    """A model loaded in one runtime, and one sequence: the first `length` of `tokens` are in its cache.

    `tokens` are the same random ids in every runtime, so that rewinding is all it takes to reach a
    depth that was reached before.
    """

    def __init__(self, vocab: int, context: int) -> None:
        self.tokens = random.Random(0).choices(range(vocab), k=context)

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """`weight_bytes` that generating a token reads, and what else identifies the runtime."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens in the cache."""

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on."""

    @abstractmethod
    def feed(self, tokens: Sequence[int]) -> None:
        """Append tokens as a prompt; logits for the last only."""

    @abstractmethod
    def step(self, token: int) -> None:
        """Append one token and compute its logits."""

    def reach(self, depth: int) -> None:
        """Have exactly the first `depth` tokens in the cache."""
        if self.length > depth:
            self.rewind(depth)
        elif self.length < depth:
            self.feed(self.tokens[self.length : depth])

    def pp(self, count: int) -> float:
        """Seconds for a prompt of `count` tokens."""
        self.reach(0)
        start = time.perf_counter()
        self.feed(self.tokens[:count])
        return time.perf_counter() - start

    def tg(self, count: int, depth: int) -> float:
        """Seconds for `count` tokens, one by one, behind `depth` others."""
        self.reach(depth)
        start = time.perf_counter()
        for token in self.tokens[depth : depth + count]:
            self.step(token)
        return time.perf_counter() - start


class LogitsRunner(Runner):
    """A runtime that also gives its caller the logits: of several rows of a forward, and to sample from."""

    @abstractmethod
    def batch(self, tokens: Sequence[int]) -> None:
        """Append tokens in one forward with logits for each, as a verification of drafts needs."""

    @abstractmethod
    def last_logits(self) -> list[float]:
        """The logits of the last token of the last forward."""

    @abstractmethod
    def start_greedy(self) -> None:
        """Begin a generation behind the first of `tokens`."""

    @abstractmethod
    def greedy(self) -> None:
        """Compute one token and choose it with the runtime's own greedy sampler."""

    def gen(self, count: int) -> float:
        """Seconds for `count` tokens as a user gets them: forward and sampler in turn."""
        self.start_greedy()
        start = time.perf_counter()
        for _ in range(count):
            self.greedy()
        return time.perf_counter() - start

    def rows(self, count: int) -> float:
        """Seconds for one forward of `count` rows, the mean of some."""
        seconds = 0.0
        for _ in range(ROWS_FORWARDS):
            self.reach(ROWS_DEPTH)
            start = time.perf_counter()
            self.batch(self.tokens[ROWS_DEPTH : ROWS_DEPTH + count])
            seconds += time.perf_counter() - start
        return seconds / ROWS_FORWARDS

    def logits(self, count: int) -> list[float]:
        """Logits after the first `count` tokens: to check that two runtimes hold the same model."""
        self.reach(0)
        self.feed(self.tokens[:count])
        return self.last_logits()


def serve(load: Callable[[str, int, int], Runner]) -> None:
    """Answer requests until the pipe ends. `load` takes a file, threads and context."""
    # Libraries print to the standard output too: keep the pipe for answers, send the rest to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session: Runner | None = None
    for line in sys.stdin:
        word, *arguments = shlex.split(line)
        try:
            if word == "load":
                session = load(arguments[0], int(arguments[1]), int(arguments[2]))
                answer: Any = session.info() | {"commands": [c for c in COMMANDS if hasattr(session, c)]}
            elif word == "cpu":
                answer = time.process_time()
            elif word in COMMANDS and hasattr(session, word):
                answer = getattr(session, word)(*map(int, arguments))
            else:
                raise ValueError(f"found the request {word!r}, expected load, cpu or what load listed")
        except Exception as error:  # the driver decides what a failure means, not this process
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
