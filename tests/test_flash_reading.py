"""How many reads at once: what is measured while a model is loaded, and what follows from it."""

import errno
import mmap
import threading
from pathlib import Path

import pytest

from edgert.devices.probe import flash_rates
from edgert.errors import ModelFileError, UsageError
from edgert.flash.reading import (
    BATCH,
    CANDIDATES,
    MIB,
    Reading,
    Span,
    choose,
    cut,
    rate,
    read_all,
    read_and_measure,
)
from tests import kernel_inputs as inputs

DATA = inputs.raw("reading", 3 * MIB).tobytes()


class Device:
    """Gives the bytes of DATA and, behind them, zeros; counts them. Fails at one byte."""

    def __init__(self, broken_at: int = -1) -> None:
        self._broken_at = broken_at
        self._lock = threading.Lock()
        self.bytes = 0

    def read(self, offset: int, into: memoryview) -> int:
        if offset <= self._broken_at < offset + len(into):
            raise OSError(errno.EIO, "Input/output error")
        with self._lock:
            self.bytes += len(into)
        into[:] = DATA[offset : offset + len(into)].ljust(len(into), b"\0")
        return len(into)

    def close(self) -> None:
        pass


def spans(*sizes: int) -> list[Span]:
    found, at = [], 0
    for number, size in enumerate(sizes):
        found.append(Span(f"tensor {number}", at, memoryview(mmap.mmap(-1, size)), size - 100))
        at += size
    return found


@pytest.mark.parametrize("reading", [Reading(1, MIB), Reading(3, 4096), Reading(8, 5 * 4096)], ids=str)
def test_all_bytes_come_whoever_reads_them(reading: Reading) -> None:
    wanted = spans(MIB, 4096, 3 * 4096, MIB)
    read_all(Device(), wanted, reading)
    for span in wanted:
        assert bytes(span.into) == DATA[span.offset : span.offset + len(span.into)]


def test_the_first_error_ends_the_reading_and_names_the_span() -> None:
    with pytest.raises(ModelFileError, match=r"tensor 1 cannot be read \(Input/output error\)"):
        read_all(Device(broken_at=MIB + 5000), spans(MIB, 4 * 4096, MIB), Reading(4, 4096))


def test_pieces_know_how_much_of_them_the_file_must_hold() -> None:
    span = Span("t", 8192, memoryview(mmap.mmap(-1, 3 * 4096)), 2 * 4096 + 7)
    pieces = cut(span, 4096)
    assert [piece.offset for piece in pieces] == [8192, 12288, 16384]
    assert [piece.wanted for piece in pieces] == [4096, 4096, 7]


def test_what_is_measured_is_read_once() -> None:
    device, sizes = Device(), (40 * MIB, 4096, 30 * MIB)
    _, rates = read_and_measure(device, spans(*sizes))
    assert device.bytes == sum(sizes)
    assert set(rates) <= set(CANDIDATES)
    assert len(rates) >= 4


def test_a_model_too_small_to_measure_with_is_read_all_the_same() -> None:
    device = Device()
    assert read_and_measure(device, spans(4096, 8192)) == (Reading(), {})
    assert device.bytes == 12288


def test_the_way_that_was_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which four readers get four times what one gets, and pieces of 4 MiB a little more."""
    now = [0.0]

    def take(source: object, wanted: list[Span], way: Reading) -> None:
        speed = min(way.readers, 4) * (1.1e9 if way.piece > MIB else 1e9)
        now[0] += sum(len(span.into) for span in wanted) / speed

    monkeypatch.setattr("edgert.flash.reading.read_all", take)
    wanted = spans(len(CANDIDATES) * BATCH)
    reading, rates = read_and_measure(Device(), wanted, clock=lambda: now[0])
    assert reading == Reading(4, 4 * MIB)
    assert set(rates) == set(CANDIDATES)
    assert rates[Reading(1, MIB)] == pytest.approx(1e9)


def test_readers_that_gain_nothing_are_not_kept() -> None:
    rates = {Reading(1, MIB): 0.99e9, Reading(2, MIB): 1e9, Reading(4, MIB): 1e9, Reading(1, 4 * MIB): 0.98e9}
    assert choose(rates) == Reading(1, MIB)
    assert choose(rates | {Reading(4, 4 * MIB): 1.8e9}) == Reading(4, 4 * MIB)


def test_a_file_is_read_at_random_places_to_time_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    assert rate(path, MIB, Reading(2, MIB), reads=3) > 0
    with pytest.raises(UsageError, match="has 3 MiB, expected at least 256"):
        flash_rates(path)
