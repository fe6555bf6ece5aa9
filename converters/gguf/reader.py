"""GGUF files: metadata and where the tensors lie, in one file or in numbered parts.

Versions 2 and 3, little-endian, as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has
them. Every rule is checked before a number of the file is used; what breaks one is a
ConversionError of one line.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.gguf.cursor import Cursor, Value, damaged
from edgert.converters.gguf.layout import TensorType
from edgert.converters.gguf.types import TYPES
from edgert.converters.hf_config import shown
from edgert.converters.quantize import Codes
from edgert.converters.source_bytes import read_bytes
from edgert.errors import ConversionError, NotAModelError, UnsupportedError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
# Limits of the format, of llama.cpp's GGML_MAX_DIMS, and the bytes that the shortest entries take.
MAX_KEY_BYTES: Final = 65535
MAX_NAME_BYTES: Final = 64
MAX_DIMENSIONS: Final = 4
LEAST_PAIR_BYTES: Final = 8 + 1 + 4 + 1
LEAST_TENSOR_BYTES: Final = 8 + 1 + 4 + 8 + 4 + 8

_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

Metadata = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies."""

    name: str
    path: Path
    kind: TensorType
    shape: tuple[int, ...]  # rows first: the reverse of the file's order
    offset: int  # from the start of the file
    picked: NDArray[np.int64] | None = field(default=None, compare=False)  # rows, where not all in order

    @property
    def readable(self) -> bool:
        """Whether it is of a type that holds weights."""
        return self.kind.decode is not None

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return math.prod(self.shape) // self.kind.block * self.kind.nbytes

    def part(self, number: int) -> "GgufTensor":
        """One of the matrices of a tensor [E, N, K]."""
        one = replace(self, name=f"{self.name}.{number}", shape=self.shape[1:])
        return replace(one, offset=self.offset + number * one.nbytes)

    def rows(self, start: int, count: int) -> NDArray[np.uint8]:
        """The stored bytes of rows of a matrix [N, K]: [count, bytes of a row]."""
        row_bytes = self.shape[1] // self.kind.block * self.kind.nbytes
        if self.picked is None:
            raw = self._read(start * row_bytes, count * row_bytes)
            return np.frombuffer(raw, np.uint8).reshape(count, row_bytes)
        rows = self.picked[start : start + count]  # read with all that lie between them
        first, last = int(rows.min()), int(rows.max())
        raw = self._read(first * row_bytes, (last + 1 - first) * row_bytes)
        return np.frombuffer(raw, np.uint8).reshape(-1, row_bytes)[rows - first]

    def pick(self, rows: NDArray[np.int64]) -> "GgufTensor":
        """Some rows of a matrix, or values of a vector, in another order."""
        rows = rows if self.picked is None else self.picked[rows]
        return replace(self, shape=(len(rows), *self.shape[1:]), picked=rows)

    def vector(self) -> NDArray[np.float32]:
        """The whole tensor, flattened, as float32."""
        if self.picked is not None:
            length = int(self.picked.max()) + 1
            return replace(self, shape=(length,), picked=None).vector()[self.picked]
        raw = np.frombuffer(self._read(0, self.nbytes), np.uint8)
        weights = self.kind.weights(raw[None])
        return (weights.floats() if isinstance(weights, Codes) else weights).reshape(-1)

    def _read(self, start: int, nbytes: int) -> bytes:
        return read_bytes(self.path, self.offset + start, nbytes, self.name)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A model: one file, or all its parts."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """The metadata and tensors of a GGUF file, or of all parts of a split one given any of them.

    Raises NotAModelError for a file that is no GGUF, UnsupportedError for another version or byte
    order, ConversionError for a damaged file or a missing part.
    """
    opened = _open_one(path)
    if _split_number(opened, "split.count") > 1:
        return _open_parts(opened)
    return opened


def _split_number(opened: GgufFile, key: str) -> int:
    value = opened.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise damaged(opened.path, f"{key} {shown(value)}", "a whole number >= 0")
    return value


def _open_parts(opened: GgufFile) -> GgufFile:
    """All parts of a split file; the first has the metadata."""
    count = _split_number(opened, "split.count")
    name = _PART.fullmatch(opened.path.name)
    if name is None or int(name[3]) != count or int(name[2]) != _split_number(opened, "split.no") + 1:
        raise ConversionError(
            f"{opened.path}: found part {_split_number(opened, 'split.no') + 1} of {count} under this name, "
            f"expected NAME-00001-of-{count:05}.gguf; give the parts the names they were published with"
        )
    paths = [opened.path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ConversionError(
            f"{missing}: found no such file, expected all {count} parts of the model beside each other; "
            "download the missing ones"
        )
    tensors: dict[str, GgufTensor] = {}
    first = None
    for number, path in enumerate(paths):
        part = opened if path == opened.path else _open_one(path)
        first = first or part
        found = _split_number(part, "split.no"), _split_number(part, "split.count")
        twice = next((name for name in part.tensors if name in tensors), None)
        if found != (number, count) or twice is not None:
            what = f"tensor {twice} a second time" if twice else f"part {found[0] + 1} of {found[1]}"
            raise damaged(path, what, f"part {number + 1} of {count}")
        tensors.update(part.tensors)
    assert first is not None
    expected = _split_number(first, "split.tensors.count")
    if len(tensors) != expected:
        raise damaged(first.path, f"{len(tensors)} tensors in all parts", str(expected))
    return replace(first, tensors=tensors)


def _open_one(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            return _parse(file, path, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from None


def _parse(file: BinaryIO, path: Path, size: int) -> GgufFile:
    _check_start(file.read(8), path)
    file.seek(0)
    cursor = Cursor(file, path, size)
    cursor.u64("the format and its version")
    tensor_count = cursor.count(LEAST_TENSOR_BYTES, "tensors")
    pair_count = cursor.count(LEAST_PAIR_BYTES, "keys")
    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        key = cursor.text("a key", MAX_KEY_BYTES)
        if key in metadata:
            raise damaged(path, f"key {shown(key)} twice", "it once")
        metadata[key] = cursor.value(cursor.u32(f"the type of {shown(key)}"), shown(key))
    entries: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        tensor = _entry(cursor, path)
        if tensor.name in entries:
            raise damaged(path, f"tensor {shown(tensor.name)} twice", "it once")
        entries[tensor.name] = tensor
    alignment = _alignment(metadata, path)
    data_start = -(-cursor.place // alignment) * alignment
    return GgufFile(path, metadata, _placed(entries, path, data_start, alignment, size))


def _check_start(start: bytes, path: Path) -> None:
    """The magic and the version; a file of the other byte order has its version reversed."""
    if start.startswith(b"version "):
        raise ConversionError(
            f"{path}: found a Git LFS pointer, expected the file itself; run git lfs pull in its folder"
        )
    if start[:4] != MAGIC:
        raise NotAModelError(
            f"{path}: found a file that starts with {shown(start[:4])}, expected {MAGIC!r}; check the path"
        )
    version = int.from_bytes(start[4:8], "little")
    if len(start) == 8 and version not in VERSIONS:
        swapped = int.from_bytes(start[4:8], "big")
        found = f"big-endian GGUF version {swapped}" if swapped in VERSIONS else f"GGUF version {version}"
        raise UnsupportedError(
            f"{path}: found {found}, expected little-endian GGUF version 2 or 3; "
            "download a version of the model made for little-endian machines with a recent llama.cpp"
        )


def _entry(cursor: Cursor, path: Path) -> GgufTensor:
    """One tensor of the header; its offset still counts from the start of the data."""
    name = cursor.text("the name of a tensor", MAX_NAME_BYTES)
    what = f"the shape of {shown(name)}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise damaged(path, f"{shown(name)} of {dimensions} dimensions", f"1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(what) for _ in range(dimensions))[::-1]
    number = cursor.u32(f"the type of {shown(name)}")
    offset = cursor.u64(f"the offset of {shown(name)}")
    kind = TYPES.get(number)
    if kind is None:
        raise UnsupportedError(
            f"{path}: found {shown(name)} of tensor type {number}, expected one that edgert knows; "
            "convert a version of the model quantised otherwise"
        )
    if 0 in shape or shape[-1] % kind.block:
        raise damaged(
            path,
            f"{shown(name)} of shape {list(shape)} in {kind.name}",
            f"rows of a positive multiple of {kind.block} weights",
        )
    return GgufTensor(name, path, kind, shape, offset)


def _alignment(metadata: Metadata, path: Path) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value <= 0 or value & (value - 1):
        raise damaged(path, f"general.alignment {shown(value)}", "a power of two")
    return value


def _placed(
    entries: dict[str, GgufTensor], path: Path, data_start: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """The tensors at their places in the file: aligned, inside it, and none over another."""
    end = data_start
    placed = {}
    for tensor in sorted(entries.values(), key=lambda t: t.offset):
        start = data_start + tensor.offset
        if tensor.offset % alignment or start < end:
            raise damaged(
                path,
                f"{shown(tensor.name)} at byte {start:,}",
                f"a multiple of {alignment} behind byte {end:,}",
            )
        end = start + tensor.nbytes
        if end > size:
            raise damaged(path, f"{size:,} bytes", f"{end:,} or more, for {shown(tensor.name)}")
        placed[tensor.name] = replace(tensor, offset=start)
    return placed
