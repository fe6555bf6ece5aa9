"""Measuring a device: how fast it reads memory, multiplies, and what a few more rows cost.

These are the numbers decoding is judged by: a token cannot come faster than the model is read.
"""

import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import UsageError
from edgert.flash.reading import CANDIDATES, rate
from edgert.kernels import matmul, packing, stream, target

STREAM_BYTES = 512 << 20
"""Read per measurement: many times any cache."""
_FLASH_FILE = 256 << 20
"""The least file that flash is measured with."""
_ROUNDS = 7
"""Measurements of each figure; their median is given, because shared machines hiccup."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured. Lists go by threads (1, 2, ...) or by `rows`."""

    cpu: str
    lowering: str
    cores: int
    ram_bytes: int
    stream_gb_s: tuple[float, ...]  # by threads
    q4_gop_s: tuple[float, ...]  # 8-row products of a matrix in cache, by threads
    rows: tuple[int, ...]
    row_cost: tuple[float, ...]  # time of a product of so many rows over that of one, one thread


def probe(threads: int) -> Probe:
    """Measure with 1 to `threads` threads; takes some seconds."""
    rows = (1, 2, 4, 8, 16)
    costs = row_times(rows)
    return Probe(
        cpu=cpu_model(),
        lowering=target.lowering().name,
        cores=threads,
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        stream_gb_s=tuple(stream_bandwidth(n) / 1e9 for n in range(1, threads + 1)),
        q4_gop_s=tuple(product_rate(n) / 1e9 for n in range(1, threads + 1)),
        rows=rows,
        row_cost=tuple(cost / costs[0] for cost in costs),
    )


def flash_rates(path: Path) -> dict[str, float]:
    """GB/s of reading a file past the page cache, by how many read at once and how much at a time.

    Keys are like "4 x 1 MiB". Raises UsageError for a file too small to say anything.
    """
    if path.stat().st_size < _FLASH_FILE:
        raise UsageError(
            f"{path} has {path.stat().st_size >> 20} MiB, expected at least {_FLASH_FILE >> 20}, so that no "
            "cache of the device holds it; give a larger file"
        )
    ways = sorted(CANDIDATES, key=lambda way: (way.piece, way.readers))
    return {str(way): rate(path, 4 << 20, way) / 1e9 for way in ways}


class StreamReader:
    """Reads one large array with some threads. Keep it: touching the memory first takes longer."""

    def __init__(self, threads: int, size: int = STREAM_BYTES) -> None:
        self.part = size // threads // stream.STEP * stream.STEP
        self.threads, self.nbytes = threads, self.part * threads
        self._data = np.ones(size, np.uint8)
        self.seconds()

    def seconds(self) -> float:
        """Time of one reading of `nbytes` bytes."""
        start = time.perf_counter()
        _together(self.threads, lambda n: stream.read(self._data, n * self.part, self.part))
        return time.perf_counter() - start


def stream_bandwidth(threads: int, rounds: int = _ROUNDS) -> float:
    """Bytes per second that `threads` threads read together."""
    reader = StreamReader(threads)
    return reader.nbytes / float(np.median([reader.seconds() for _ in range(rounds)]))


def product_rate(threads: int, rounds: int = _ROUNDS) -> float:
    """Operations per second (two per weight and row) of q4 products of 64 rows, weights in cache."""
    n, k, rows, turns = 256, 2048, 64, 20
    work = [Product(n, k, rows) for _ in range(threads)]

    def repeat(thread: int) -> None:
        for _ in range(turns):
            work[thread].run(rows)

    seconds = _median(lambda: _together(threads, repeat), rounds)
    return threads * turns * 2.0 * n * k * rows / seconds


def row_times(rows: tuple[int, ...], rounds: int = _ROUNDS) -> list[float]:
    """Seconds of a q4 product of a matrix far larger than the caches, for each number of rows."""
    work = Product(32768, 8192, max(rows))
    times: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + 1):  # in turn, so that a drift of the machine meets all of them
        for count, kept in zip(rows, times, strict=True):
            start = time.perf_counter()
            work.run(count)
            if turn:
                kept.append(time.perf_counter() - start)
    return [float(np.median(kept)) for kept in times]


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Product:
    """A q4 matrix [n, k] of arbitrary weights, and rows to multiply it with."""

    def __init__(self, n: int, k: int, rows: int) -> None:
        self.blocks, self.groups, self.stride = n // 16, k // 32, n
        self.w: NDArray[np.uint8] = np.full(
            self.blocks * self.groups * packing.RECORD_BYTES["q4"], 0x11, np.uint8
        )
        self.xq = np.ones(rows * k, np.int8)
        self.xs = np.ones(rows * self.groups, np.float32)
        self.xn = np.ones(rows * self.groups, np.int32)
        self.y = np.zeros(rows * n, np.float32)

    def run(self, rows: int, most: int = matmul.MOST, ahead: int = matmul.AHEAD) -> None:
        """Multiply with the first `rows` rows; `most` and `ahead` as in kernels/matmul.py."""
        rest = (rows, self.xq, self.xs, self.xn, 0, self.y, 0, self.stride, most, ahead)
        matmul.matmul_q4(self.w, 0, self.groups, 0, self.blocks, *rest)


def _together(threads: int, work: Callable[[int], object]) -> None:
    """Run work(0), work(1), ... at once and wait for all."""
    others = [threading.Thread(target=work, args=(n,)) for n in range(1, threads)]
    for thread in others:
        thread.start()
    work(0)
    for thread in others:
        thread.join()


def _median(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of `rounds` runs after a first that compiles and touches the memory."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
