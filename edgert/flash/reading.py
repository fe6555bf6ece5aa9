"""How many reads at once, and how large: what this flash is fastest with, found by reading from it."""

import mmap
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from edgert.errors import EdgertError, ModelFileError
from edgert.flash.source import FileSource, Source
from edgert.format.layout import PAGE

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Reading:
    """A way to read: so many threads, each a piece at a time."""

    readers: int = 1
    piece: int = 4 * MIB  # bytes; a larger segment is cut, and its pieces are read side by side

    def __str__(self) -> str:
        return f"{self.readers} x {self.piece >> 20} MiB"


CANDIDATES = tuple(Reading(n, piece) for n in (4, 1, 2, 8) for piece in (MIB, 4 * MIB))
"""What is tried, the likely best first: a small model may be loaded before all were. Below 1 MiB one
read costs more for its latency (0.15 ms) than it saves; an expert of 4 MiB is a large one."""
BATCH = 16 * MIB
"""Bytes read one way before the next is tried: two rounds of eight readers with pieces of 1 MiB."""
ENOUGH = 0.95
"""Of the fastest: a way with fewer readers is taken from there on; they cost the cores something."""


class Span(NamedTuple):
    """Bytes of a file, and the memory they belong to."""

    name: str  # for messages
    offset: int
    into: memoryview
    wanted: int  # bytes of `into` that the file must hold; pages go on behind them


def read_span(source: Source, span: Span) -> None:
    """Read it; raises ModelFileError with its name for an error, or where too few bytes came."""
    try:
        count = source.read(span.offset, span.into)
    except OSError as error:
        raise ModelFileError(
            f"{span.name} cannot be read ({error.strerror or error}); check the disk, or copy the file again"
        ) from None
    if count < span.wanted:
        raise ModelFileError(
            f"found {count} bytes of {span.name}, expected {span.wanted}; "
            "the file was cut short, or changed while it was open: copy it again"
        )


def cut(span: Span, piece: int) -> list[Span]:
    """The span in pieces of at most so many bytes."""
    return [
        Span(span.name, span.offset + at, span.into[at : at + piece], min(piece, max(0, span.wanted - at)))
        for at in range(0, len(span.into), piece)
    ]


def read_all(source: Source, spans: Sequence[Span], reading: Reading) -> None:
    """Read all of them, as `reading` says; raises the first error met."""
    left = [piece for span in reversed(spans) for piece in reversed(cut(span, reading.piece))]
    errors: list[EdgertError] = []

    def work() -> None:
        while not errors:
            try:
                read_span(source, left.pop())
            except IndexError:
                return
            except EdgertError as error:
                errors.append(error)

    others = [threading.Thread(target=work, name="edgert-load") for _ in range(reading.readers - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]


def read_and_measure(
    source: Source, spans: Sequence[Span], clock: Callable[[], float] = time.perf_counter
) -> tuple[Reading, dict[Reading, float]]:
    """Read all spans, some in each way of CANDIDATES by turns; the way that is best, and bytes per second.

    Nothing is read twice: what is measured is the loading of the model. Where it is too small to measure
    anything, Reading() is as good as any.
    """
    # Small pieces would be judged by their latency: they are read last, in the way that was found.
    small = [span for span in spans if len(span.into) < MIB]
    batches: list[list[Span]] = [[]]
    for part in (part for span in spans if len(span.into) >= MIB for part in cut(span, BATCH)):
        if sum(len(held.into) for held in batches[-1]) + len(part.into) > BATCH:
            batches.append([])
        batches[-1].append(part)
    rates: dict[Reading, list[float]] = {}
    for turn, batch in enumerate(batches):
        reading, began = CANDIDATES[turn % len(CANDIDATES)], clock()
        read_all(source, batch, reading)
        size = sum(len(part.into) for part in batch)
        if size > BATCH // 2:
            rates.setdefault(reading, []).append(size / max(1e-9, clock() - began))
    found = {reading: median(kept) for reading, kept in rates.items()}
    best = choose(found)
    read_all(source, small, best)
    return best, found


def rate(path: Path, size: int, reading: Reading, reads: int = 24) -> float:
    """Bytes per second of reading `reads` spans of `size` bytes at random places of a file.

    Raises ModelFileError where they cannot be read.
    """
    memory = memoryview(mmap.mmap(-1, reads * size))
    pages = max(1, (path.stat().st_size - size) // PAGE)
    places = [random.Random(at).randrange(pages) * PAGE for at in range(reads)]
    spans = [Span(path.name, at, memory[i * size : (i + 1) * size], 0) for i, at in enumerate(places)]
    memory[:] = bytes(len(memory))  # touched once, outside the timing
    source = FileSource(path)
    try:
        began = time.perf_counter()
        read_all(source, spans, reading)
        return reads * size / (time.perf_counter() - began)
    finally:
        source.close()


def choose(rates: dict[Reading, float]) -> Reading:
    """The way with the fewest readers, and then the smallest pieces, of those that are nearly the fastest."""
    if not rates:
        return Reading()
    bar = ENOUGH * max(rates.values())
    good = [reading for reading, rate in rates.items() if rate >= bar]
    return min(good, key=lambda reading: (reading.readers, reading.piece))
