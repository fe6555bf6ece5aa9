"""The header of a GGUF file, value by value; nothing is read or made before the file is known to hold it.

Everything is little-endian. A string is a 64-bit length and UTF-8 bytes; an array is the number of
its type, a 64-bit count and its items (ggml/docs/gguf.md, version 3).
"""

import struct
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConversionError

# Vocabularies of 260,000 tokens make headers of 20 MB.
MAX_HEADER_BYTES: Final = 256 << 20
# A string of two bytes takes six times that in Python; a vocabulary and its merges are 800,000.
MAX_STRINGS: Final = 1 << 22
_FIRST_READ: Final = 1 << 16

_NUMBERS: Final[dict[int, str]] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

Value = int | float | bool | str | list[str] | NDArray[np.generic]
"""Of metadata. Arrays of numbers and truth values are NumPy arrays."""


def damaged(path: Path, found: str, expected: str) -> ConversionError:
    """What to raise for a file that breaks a rule of the format."""
    return ConversionError(
        f"{path}: found {found}, expected {expected}; the file is damaged, download it again"
    )


class Cursor:
    """A place in the header. The file is read in growing pieces, up to where the header ends."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._data = bytearray()
        self._strings = 0
        self.place = 0

    def u32(self, what: str) -> int:
        """A 32-bit count or type."""
        return int(_U32.unpack_from(self._data, self._take(4, what))[0])

    def u64(self, what: str) -> int:
        """A 64-bit count, length or offset."""
        return int(_U64.unpack_from(self._data, self._take(8, what))[0])

    def count(self, least_bytes: int, what: str) -> int:
        """A number of things that follow, each of at least so many bytes."""
        count = self.u64(f"the number of {what}")
        if count * least_bytes > self._size - self.place:
            raise damaged(
                self._path, f"{count:,} {what} in {self._size - self.place:,} bytes", "as many as fit in it"
            )
        return count

    def text(self, what: str, limit: int) -> str:
        """A string of at most `limit` bytes."""
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise damaged(self._path, f"{what} of {length:,} bytes", f"at most {limit:,}")
        start = self._take(length, what)
        return self._decoded(start, start + length, what)

    def value(self, kind: int, what: str) -> Value:
        """A value of metadata."""
        if kind == _STRING:
            return self.text(what, MAX_HEADER_BYTES)
        if kind == _ARRAY:
            return self._array(what)
        values = self._numbers(kind, 1, what)
        single: int | float | bool = values[0].item()
        return single

    def _array(self, what: str) -> list[str] | NDArray[np.generic]:
        kind = self.u32(f"the type of {what}")
        if kind == _STRING:
            return self._texts(self.count(8, f"strings of {what}"), what)
        if kind == _ARRAY:
            raise damaged(self._path, f"{what}, an array of arrays", "one of numbers or strings")
        return self._numbers(kind, self.count(1, f"items of {what}"), what)

    def _numbers(self, kind: int, count: int, what: str) -> NDArray[np.generic]:
        if kind != _BOOL and kind not in _NUMBERS:
            raise damaged(self._path, f"{what} of type {kind}", "a type of 0 to 12")
        dtype = np.dtype(_NUMBERS.get(kind, "u1"))
        start = self._take(count * dtype.itemsize, what)
        values = np.frombuffer(bytes(self._data[start : self.place]), dtype)
        if kind != _BOOL:
            return values
        if (values > 1).any():
            raise damaged(self._path, f"{what} of {values.max()}", "true or false, as 1 or 0")
        return values.astype(np.bool_)

    def _texts(self, count: int, what: str) -> list[str]:
        """An array of strings; the loop is what reading a large vocabulary takes."""
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise damaged(self._path, f"{self._strings:,} strings", f"at most {MAX_STRINGS:,}")
        texts = []
        data, place, known = self._data, self.place, len(self._data)
        for _ in range(count):
            start = place + 8
            if start > known:
                known = self._reach(start, what)
            place = start + _U64.unpack_from(data, start - 8)[0]
            if place > known:
                known = self._reach(place, what)
            try:
                texts.append(data[start:place].decode())
            except UnicodeDecodeError:
                self._decoded(start, place, what)
        self.place = place
        return texts

    def _decoded(self, start: int, end: int, what: str) -> str:
        try:
            return self._data[start:end].decode()
        except UnicodeDecodeError as error:
            raise damaged(self._path, f"{what} that is not UTF-8 ({error.reason})", "UTF-8") from None

    def _take(self, nbytes: int, what: str) -> int:
        """Where the next bytes start; they are in memory, and the place is behind them."""
        start = self.place
        end = start + nbytes
        if end > len(self._data):
            self._reach(end, what)
        self.place = end
        return start

    def _reach(self, end: int, what: str) -> int:
        """Read on until `end` bytes of the file are in memory; how many are."""
        if end > self._size:
            raise damaged(self._path, f"{self._size:,} bytes", f"{end:,} or more, for {what}")
        if end > MAX_HEADER_BYTES:
            raise damaged(
                self._path, f"a header of more than {MAX_HEADER_BYTES:,} bytes at {what}", "a shorter one"
            )
        # Twice as much each time, so that reading on costs no more than reading once.
        target = min(max(end, 2 * len(self._data), _FIRST_READ), self._size, MAX_HEADER_BYTES)
        self._data += self._file.read(target - len(self._data))
        if len(self._data) < end:
            raise damaged(self._path, "a file that shrank while it was read", f"{self._size:,} bytes")
        return len(self._data)
