"""Reading spans of whole pages from a file, past the page cache where the file system allows it."""

import errno
import mmap
import os
import threading
from pathlib import Path
from typing import Protocol

from edgert.errors import ModelFileError
from edgert.format.layout import PAGE

SECTOR = 512
"""The least that any disk reads."""


class Source(Protocol):
    """Where bytes come from. Several threads read at once. Tests inject slow, short and failing ones."""

    def read(self, offset: int, into: memoryview) -> int:
        """Fill `into` from byte `offset`; gives how many bytes came. Raises OSError."""

    def close(self) -> None:
        """Give back what it holds."""


class FileSource:
    """A file read with O_DIRECT: no second copy of the weights in the page cache, which other data needs.

    `direct` is False where the file system refuses; reads then go through the page cache.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._buffered = -1  # opened where O_DIRECT is refused
        self._direct = -1
        if hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        if self._direct < 0:
            self._fall_back()
        self.unit = self._least_unit()

    def _least_unit(self) -> int:
        """At multiples of what reads may start and end: a disk of small sectors need not give whole pages."""
        try:
            os.preadv(self.descriptor, [memoryview(mmap.mmap(-1, PAGE))[:SECTOR]], SECTOR)
        except OSError:
            return PAGE
        return SECTOR

    @property
    def direct(self) -> bool:
        """Whether reads pass the page cache."""
        return self._buffered < 0

    @property
    def descriptor(self) -> int:
        """Of the open file, for compiled threads that read from it themselves."""
        return self._direct if self.direct else self._buffered

    def read(self, offset: int, into: memoryview) -> int:
        """See Source; offset and length are multiples of `unit`, the address is one of PAGE."""
        done = 0
        while done < len(into):
            direct = self.direct
            try:
                count = os.preadv(self._direct if direct else self._buffered, [into[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._fall_back()  # some file systems accept the flag and refuse the read
                continue
            if count == 0:
                break
            done += count
            if done % self.unit:
                break  # the end of the file: O_DIRECT cannot go on from here
        return done

    def close(self) -> None:
        """Close the file."""
        for descriptor in (self._direct, self._buffered):
            if descriptor >= 0:
                os.close(descriptor)
        self._direct = self._buffered = -1

    def _fall_back(self) -> None:
        with self._lock:
            if self._buffered < 0:
                self._buffered = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)


class Joined:
    """Two sources as one: the second begins at byte `behind`, which the first does not reach."""

    def __init__(self, first: Source, second: Source, behind: int) -> None:
        self._first, self._second, self._behind = first, second, behind

    def read(self, offset: int, into: memoryview) -> int:
        """See Source."""
        if offset < self._behind:
            return self._first.read(offset, into)
        return self._second.read(offset - self._behind, into)

    def close(self) -> None:
        """Close both."""
        self._first.close()
        self._second.close()


def open_source(path: Path) -> FileSource:
    """The file at `path`; raises ModelFileError where it cannot be opened."""
    try:
        return FileSource(path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}); check its rights") from None


def direct_reads(folder: Path) -> bool:
    """Whether files in this folder can be read past the page cache."""
    probe = folder / f".edgert-direct-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PAGE))
        try:
            source = FileSource(probe)
            source.read(0, memoryview(mmap.mmap(-1, PAGE)))
            direct = source.direct
            source.close()
            return direct
        finally:
            probe.unlink()
    except OSError:
        return False
