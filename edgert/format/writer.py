"""Writing an .ert file: streamed, hashed, and atomic.

The sizes of all tensors are known before the first byte is written, so the header's pages are
reserved up front and tensors can come in any order. The file has its name only when it is
complete; before that it is a temporary file beside the target, removed on any failure, and after a
death that left no time for it by the next writer of the same name.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from edgert.config import ModelSpec
from edgert.errors import ConversionError
from edgert.format.header import LENGTH_BYTES, MAX_HEADER, RESERVED_KEYS, encode_header
from edgert.format.layout import (
    LARGE_PAGE,
    LAYOUT_OF,
    PAGE,
    QUANTIZED,
    allowed_quants,
    page_padded,
    round_up,
    stored_bytes,
)
from edgert.format.tensors import TOKENIZER, StoredTensor, TensorDecl, declared

Buffer = bytes | bytearray | memoryview | npt.NDArray[Any]

# Room left in the header for what is known only at the end: per-tensor errors, about 50 bytes
# each, and a few lines of provenance.
SLACK: Final = 4096
SLACK_PER_TENSOR: Final = 128

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HASH: Final = "0" * 64
_PART: Final = ".part"
_TOKEN_BYTES: Final = 4  # of a temporary name, twice as many characters
# A new file is met before it is locked only by a writer that starts in that moment.
_MOST_MEETINGS: Final = 100
_NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


class Disk:
    """The file system as the writer needs it; tests inject one that fills up."""

    def create(self, path: Path) -> BinaryIO:
        """A new file open for writing; it must not exist yet."""
        return path.open("xb", buffering=LARGE_PAGE)

    def free(self, folder: Path) -> int:
        """Bytes that can be written in a folder."""
        return shutil.disk_usage(folder).free


class ErtWriter:
    """Writes one file; a context manager. Without `finish`, nothing is left on the disk.

    with ErtWriter(path, spec, quants, tokenizer, {"source": "..."}) as writer:
        for decl in declared(spec):
            writer.write(decl.name, data)
        writer.finish()

    `quants` gives the quantisation of every matrix and expert by name. Raises ConversionError for
    arguments that do not fit together, a full disk, or a path that cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: ModelSpec,
        quants: Mapping[str, str],
        tokenizer_json: bytes | None = None,
        metadata: Mapping[str, str] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ConversionError(f"{self.path}: found a folder, expected the name of a file to write")
        self._spec = spec
        self._tokenizer = tokenizer_json
        self._metadata = _checked_metadata(metadata or {})
        self._disk = disk or Disk()
        if tokenizer_json == b"":
            raise ConversionError("found an empty tokenizer.json, expected its bytes, or None for none")
        planned = _plan(declared(spec, len(tokenizer_json or b"")), quants)
        header = encode_header(spec, planned, self._metadata, 0)
        slack = SLACK + SLACK_PER_TENSOR * len(planned)
        self._data_start = round_up(LENGTH_BYTES + len(header) + slack, PAGE)
        if self._data_start > MAX_HEADER:
            raise ConversionError(
                f"{self.path}: found {len(header)} bytes of header, expected at most {MAX_HEADER - slack}; "
                "give less metadata"
            )
        self.tensors: dict[str, StoredTensor] = {
            t.name: replace(t, offset=self._data_start + t.offset) for t in planned
        }
        self.size = self._data_start + sum(page_padded(t.nbytes) for t in planned)  # bytes of the file
        self._missing = set(self.tensors)
        self._finished = False
        self._file: BinaryIO | None = None
        self._temporary = self._new_name()

    def __enter__(self) -> "ErtWriter":
        try:
            self._remove_leftovers()
            free = self._disk.free(self.path.parent)
            if free >= self.size:
                self._file = self._new_file()
                return self
        except OSError as error:
            raise self._failure(error) from error
        raise ConversionError(
            f"{self.path}: found {free:,} bytes free on its disk, expected {self.size:,}; "
            "free some space or write to another disk"
        )

    def _new_name(self) -> Path:
        """Beside the target, so that the final rename stays within one file system."""
        return self.path.with_name(f"{self._head}{secrets.token_hex(_TOKEN_BYTES)}{_PART}")

    @property
    def _head(self) -> str:
        return f".{self.path.name[:40]}."

    def _new_file(self) -> BinaryIO:
        """A temporary file that this writer holds, and no other takes for a leftover."""
        for _ in range(_MOST_MEETINGS):
            file, held = self._disk.create(self._temporary), False
            try:
                # Before it was locked, another writer may have locked it in passing, or removed it.
                held = _hold(file.fileno()) and self._temporary.exists()
            finally:
                if not held:
                    file.close()
                    self._temporary.unlink(missing_ok=True)
            if held:
                return file
            self._temporary = self._new_name()
        raise ConversionError(
            f"{self.path}: found {_MOST_MEETINGS} new files beside it taken by other writers of this name, "
            "expected one left alone; convert it once at a time"
        )

    def _remove_leftovers(self) -> None:
        """Temporary files of this name that no writer holds: theirs was killed, or lost its power."""
        ours = re.compile(f"{re.escape(self._head)}[0-9a-f]{{{2 * _TOKEN_BYTES}}}{re.escape(_PART)}")
        with suppress(OSError):  # a folder that cannot be listed
            for path in self.path.parent.iterdir():
                if ours.fullmatch(path.name):
                    _remove_unless_held(path)

    def write(self, name: str, data: Buffer | Iterable[Buffer]) -> None:
        """Write one tensor's bytes in its layout, whole or in chunks, and pad it to a page."""
        if name not in self._missing:
            state = "already written" if name in self.tensors else "not a tensor of this model"
            raise ConversionError(f"{self.path}: found data for {name}, {state}")
        tensor = self.tensors[name]
        digest = hashlib.sha256()
        self._seek(tensor.offset)
        written = 0
        for chunk in (data,) if isinstance(data, (bytes, bytearray, memoryview, np.ndarray)) else data:
            view = _byte_view(chunk)
            written += view.nbytes
            if written > tensor.nbytes:
                break
            digest.update(view)
            self._put(view)
        if written != tensor.nbytes:
            count = f"more than {tensor.nbytes}" if written > tensor.nbytes else str(written)
            raise ConversionError(f"{self.path}: found {count} bytes for {name}, expected {tensor.nbytes}")
        self._put(bytes(page_padded(written) - written))
        self.tensors[name] = replace(tensor, sha256=digest.hexdigest())
        self._missing.remove(name)

    def finish(self, extra_metadata: Mapping[str, str] | None = None) -> None:
        """Write the header and give the file its name; an existing file is replaced at once."""
        if self._tokenizer is not None and TOKENIZER in self._missing:
            self.write(TOKENIZER, self._tokenizer)
        if self._missing:
            first = next(name for name in self.tensors if name in self._missing)
            raise ConversionError(
                f"{self.path}: found no data for {len(self._missing)} tensors, first {first}"
            )
        metadata = {**self._metadata, **_checked_metadata(extra_metadata or {})}
        header = encode_header(self._spec, self.tensors.values(), metadata, self._data_start)
        length = self._data_start - LENGTH_BYTES
        if len(header) > length:
            raise ConversionError(
                f"{self.path}: found {len(header)} bytes of header, expected at most {length}; "
                "give less metadata, or give it when the writer is made"
            )
        self._seek(0)
        self._put(length.to_bytes(LENGTH_BYTES, "little") + header.ljust(length))
        self._commit()

    def _commit(self) -> None:
        """The bytes reach the disk before the name does: a power cut leaves the old file or the new."""
        file = self._opened()
        try:
            file.flush()
            os.fsync(file.fileno())
            self._temporary.replace(self.path)
            self._finished = True
            file.close()  # and unlocked, now that it no longer has the name of a leftover
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._failure(error) from error

    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise ConversionError(
                f"{self.path}: found a writer that was not entered; use `with ErtWriter(...)`"
            )
        return self._file

    def _seek(self, offset: int) -> None:
        file = self._opened()
        try:
            if file.tell() != offset:
                file.seek(offset)
        except OSError as error:  # seeking flushes
            raise self._failure(error) from error

    def _put(self, data: bytes | memoryview) -> None:
        """Write in steps that end where a large page ends: the system then keeps what it has just been
        given in large pages, and a file used right after its conversion is read as fast as any."""
        file, rest = self._opened(), memoryview(data)
        try:
            while rest:
                room = LARGE_PAGE - file.tell() % LARGE_PAGE
                file.write(rest[:room])
                if len(rest) >= room:
                    file.flush()
                rest = rest[room:]
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> ConversionError:
        if error.errno in _DISK_FULL:
            return ConversionError(
                f"{self.path}: found its disk full ({error.strerror}), expected room for "
                f"{self.size:,} bytes; free some space or write to another disk"
            )
        return ConversionError(f"{self.path}: cannot be written ({error.strerror}); check the folder")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None and not self._finished:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def _byte_view(chunk: Buffer) -> memoryview:
    """The bytes of a chunk in C order; copied only where they do not lie so."""
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk)


def _plan(decls: tuple[TensorDecl, ...], quants: Mapping[str, str]) -> list[StoredTensor]:
    """The tensors with their sizes and their offsets from the start of the data."""
    matrices = {decl.name for decl in decls if decl.role in QUANTIZED}
    if quants.keys() != matrices:
        wrong = sorted(matrices ^ quants.keys())[0]
        state = "no" if wrong in matrices else "a"
        raise ConversionError(
            f"found {state} quantisation for {wrong}, expected one for each matrix or expert only"
        )
    planned = []
    offset = 0
    for decl in decls:
        allowed = allowed_quants(decl.role, decl.shape)
        quant = quants.get(decl.name, allowed[0])
        if quant not in allowed:
            raise ConversionError(f"found quantisation {quant!r} for {decl.name}, expected one of {allowed}")
        nbytes = stored_bytes(decl.role, quant, decl.shape)
        layout = LAYOUT_OF[decl.role]
        planned.append(
            StoredTensor(decl.name, decl.role, decl.shape, quant, layout, offset, nbytes, _NO_HASH)
        )
        offset += page_padded(nbytes)
    return planned


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, text in metadata.items():
        if key in RESERVED_KEYS:
            raise ConversionError(f"found metadata {key!r}, which is the format's own; expected another key")
        try:
            (key + text).encode("utf-8")
        except (TypeError, UnicodeEncodeError) as error:
            raise ConversionError(f"found metadata {key!r} that is not Unicode text ({error})") from None
    return dict(metadata)


def _try_lock(descriptor: int) -> bool:
    """Whether the file is this process's alone from now on; its end frees it, however it comes.

    OSError where it cannot be known, as on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _hold(descriptor: int) -> bool:
    """As `_try_lock`; a file system without locks lets everybody hold, and nobody remove."""
    try:
        return _try_lock(descriptor)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise


def _remove_unless_held(path: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _try_lock(descriptor):  # or an OSError: leftovers stay on a file system without locks
                path.unlink()
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
