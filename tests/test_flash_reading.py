"""How many reads at once: what is measured while a model is loaded, and what follows from it."""

import errno
import mmap
import threading
import time
from pathlib import Path

import pytest

from edgert.devices.probe import flash_rates
from edgert.errors import ModelFileError, UsageError
from edgert.flash.reading import CANDIDATES, MIB, Reading, Span, choose, cut, rate, read_all, read_and_measure
from tests import kernel_inputs as inputs

DATA = inputs.raw("reading", 3 * MIB).tobytes()


class Device:
    """Takes `latency` seconds for any read, and gives so many bytes per second to all readers together."""

    def __init__(self, latency: float, rate: float, broken_at: int = -1) -> None:
        self._latency, self._rate, self._broken_at = latency, rate, broken_at
        self._lock = threading.Lock()
        self._bus_free = 0.0
        self.bytes = 0

    def read(self, offset: int, into: memoryview) -> int:
        if offset <= self._broken_at < offset + len(into):
            raise OSError(errno.EIO, "Input/output error")
        with self._lock:
            self.bytes += len(into)
            self._bus_free = max(self._bus_free, time.perf_counter()) + len(into) / self._rate
            until = self._bus_free + self._latency
        time.sleep(max(0.0, until - time.perf_counter()))
        into[:] = bytes(len(into)) if offset + len(into) > len(DATA) else DATA[offset : offset + len(into)]
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
    read_all(Device(0, 1e12), wanted, reading)
    for span in wanted:
        assert bytes(span.into) == DATA[span.offset : span.offset + len(span.into)]


def test_the_first_error_ends_the_reading_and_names_the_span() -> None:
    with pytest.raises(ModelFileError, match=r"tensor 1 cannot be read \(Input/output error\)"):
        read_all(Device(0, 1e12, broken_at=MIB + 5000), spans(MIB, 4 * 4096, MIB), Reading(4, 4096))


def test_pieces_know_how_much_of_them_the_file_must_hold() -> None:
    span = Span("t", 8192, memoryview(mmap.mmap(-1, 3 * 4096)), 2 * 4096 + 7)
    pieces = cut(span, 4096)
    assert [piece.offset for piece in pieces] == [8192, 12288, 16384]
    assert [piece.wanted for piece in pieces] == [4096, 4096, 7]


def test_what_is_measured_is_read_once() -> None:
    device, sizes = Device(0, 1e12), (40 * MIB, 4096, 30 * MIB)
    _, rates = read_and_measure(device, spans(*sizes))
    assert device.bytes == sum(sizes)
    assert set(rates) <= set(CANDIDATES)
    assert len(rates) >= 4


def test_a_model_too_small_to_measure_with_is_read_all_the_same() -> None:
    device = Device(0, 1e12)
    assert read_and_measure(device, spans(4096, 8192)) == (Reading(), {})
    assert device.bytes == 12288


def test_where_latency_rules_more_readers_are_chosen() -> None:
    """A read of 1 MiB takes 20 ms of latency and 0.1 ms of the bus: four readers are four times as fast."""
    reading, rates = read_and_measure(Device(20e-3, 10e9), spans(*[len(CANDIDATES) * 16 * MIB]))
    assert reading.readers >= 4
    assert rates[Reading(4, MIB)] > 2 * rates[Reading(1, MIB)]


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
