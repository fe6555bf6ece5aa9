"""What parts of a file are read into."""

import ctypes
import sys
from pathlib import Path

import pytest

from edgert.flash.memory import large_pages

MIB = 1 << 20


def flags_of(address: int) -> set[str]:
    """Flags of the mapping with this address, as Linux tells them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return set(others)
    raise AssertionError("nothing is mapped there")


def test_memory_is_zeros_that_can_be_written() -> None:
    memory = large_pages(3 * MIB)
    assert len(memory) == 3 * MIB
    assert not any(memory[i] for i in range(0, 3 * MIB, 4096))
    memory[MIB : MIB + 4] = b"here"
    assert memory[MIB - 1 : MIB + 5] == b"\0here\0"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the advice")
def test_memory_is_asked_for_in_large_pages_and_kept_from_children() -> None:
    memory = large_pages(4 * MIB)
    flags = flags_of(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    assert "dc" in flags  # not copied by a fork
    assert "sh" not in flags
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in flags
