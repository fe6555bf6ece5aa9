"""Reading spans of whole pages from a file, past the page cache where the file system allows it."""

import errno
import os
from pathlib import Path
from typing import Protocol

PAGE = 4096
"""What O_DIRECT wants offsets, lengths and addresses to be multiples of, on every common device."""


class Segments(Protocol):
    """Where expert bytes come from. Tests inject ones that are slow, short, or fail."""

    def read(self, offset: int, into: memoryview) -> int:
        """Fill `into` from byte `offset`; gives how many bytes came. Raises OSError."""

    def close(self) -> None:
        """Give back what it holds."""


class FileSegments:
    """A file read with O_DIRECT: no second copy of the weights in the page cache, which other data needs.

    `direct` is False where the file system refuses; reads then go through the page cache.
    """

    def __init__(self, path: Path) -> None:
        self.direct = True
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
            self.direct = hasattr(os, "O_DIRECT")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fall_back(path)
        self._path = path

    def read(self, offset: int, into: memoryview) -> int:
        """See Segments; all three of offset, length and address are multiples of PAGE."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                os.close(self._descriptor)  # some file systems accept the flag and refuse the read
                self._fall_back(self._path)
                continue
            if count == 0:
                break
            done += count
            if done % PAGE:
                break  # the end of the file: O_DIRECT cannot go on from here
        return done

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _fall_back(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.direct = False


def direct_reads(folder: Path) -> bool:
    """Whether files in this folder can be read past the page cache."""
    probe = folder / f".edgert-direct-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PAGE))
        try:
            segments = FileSegments(probe)
            direct = segments.direct
            segments.close()
            return direct
        finally:
            probe.unlink()
    except OSError:
        return False
