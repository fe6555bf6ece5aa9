"""The weights of a Hugging Face folder: safetensors in one or many shards, read slab by slab.

The header is parsed here rather than by the safetensors library because the library maps whole
files, whose pages then count as our memory, and because it has no bfloat16 for NumPy. The rules
are those of https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgert.converters.hf_config import read_object, shown
from edgert.converters.quantize import Codes
from edgert.converters.source_bytes import read_bytes
from edgert.errors import ConversionError, NotAModelError, UnsupportedError

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
ITEM_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}
_LFS: Final = b"version https://git-lfs"
_AGAIN: Final = "download the file again"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where a tensor lies in a shard."""

    name: str
    path: Path
    dtype: str  # safetensors' name; ITEM_BYTES has those that can be read
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int
    transposed: bool = False  # in the file it is [K, N]
    picked: NDArray[np.int64] | None = field(default=None, compare=False)  # rows, after transposing

    def rows(self, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix [N, K] in slabs of `slab_rows` rows, the last maybe shorter; Codes of one in MXFP4."""
        if self.transposed:  # read whole: no rows of ours lie together
            whole = self.vector().reshape(self.shape)
            yield from (whole[start : start + slab_rows] for start in range(0, len(whole), slab_rows))
            return
        if self.picked is not None:
            for start in range(0, len(self.picked), slab_rows):
                yield self._picked_rows(self.picked[start : start + slab_rows])
            return
        rows = self.shape[0]
        yield from (self.stored(start, min(slab_rows, rows - start)) for start in range(0, rows, slab_rows))

    def part(self, first: int, rows: int, columns: int) -> "SourceTensor":
        """Rows first.. of a matrix, or of a stack of them, as a tensor of its own."""
        row_bytes = columns * self._item_bytes
        at, nbytes = self.offset + first * row_bytes, rows * row_bytes
        return replace(self, shape=(rows, columns), offset=at, nbytes=nbytes)

    @property
    def readable(self) -> bool:
        """Whether it is of a type in ITEM_BYTES."""
        return self.dtype in ITEM_BYTES

    def transpose(self) -> "SourceTensor":
        """A matrix stored as [K, N] as one of [N, K]."""
        return replace(self, shape=self.shape[::-1], transposed=True)

    def turn(self, parts: int) -> "SourceTensor":
        """A matrix [N, K] as one of [parts * K, N / parts]: each of its equal parts transposed."""
        count, columns = self.shape
        return TurnedTensor(
            self.name, self.path, self.dtype, (parts * columns, count // parts), self.offset, self.nbytes,
            of=self,
        )  # fmt: skip

    def pick(self, rows: NDArray[np.int64]) -> "SourceTensor":
        """Some rows of a matrix, or values of a vector, in another order."""
        rows = rows if self.picked is None else self.picked[rows]
        return replace(self, shape=(len(rows), *self.shape[1:]), picked=rows)

    def vector(self) -> NDArray[np.float32]:
        """The whole tensor, flattened, as float32."""
        if self.transposed:
            values = self.stored(0, self.shape[1]).T
            return np.ascontiguousarray(values if self.picked is None else values[self.picked]).reshape(-1)
        if self.picked is not None:
            return self._picked_rows(self.picked).reshape(-1)
        return self.stored(0, self.nbytes // self._row_bytes if self._row_bytes else 0).reshape(-1)

    def stored(self, first: int, count: int) -> NDArray[np.float32]:
        """Rows first.. of what is stored, before transposing and picking: [count, columns]."""
        raw = self.read(first * self._row_bytes, count * self._row_bytes)
        return _to_float32(raw, self.dtype).reshape(count, -1 if count else 0)

    @property
    def _row_bytes(self) -> int:
        """Of a row as it is stored; a vector's rows are numbers."""
        if self.transposed:
            return self.nbytes // self.shape[1]
        return self._item_bytes * (self.shape[-1] if len(self.shape) > 1 else 1)

    @property
    def _item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    def _picked_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Some rows of what is stored, read with all that lie between them."""
        first, last = int(rows.min()), int(rows.max())
        return self.stored(first, last + 1 - first)[rows - first]

    def same_bytes(self, other: "SourceTensor", piece: int = 1 << 22) -> bool:
        """Whether two tensors are equal bit for bit; reads `piece` bytes at a time."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        starts = range(0, self.nbytes, piece)
        lengths = [min(piece, self.nbytes - start) for start in starts]
        return all(
            self.read(start, n) == other.read(start, n) for start, n in zip(starts, lengths, strict=True)
        )

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes start.. of the tensor."""
        return read_bytes(self.path, self.offset + start, nbytes, self.name)


@dataclass(frozen=True, slots=True)
class TurnedTensor(SourceTensor):
    """A matrix whose equal parts are stored transposed; see `SourceTensor.turn`."""

    of: SourceTensor | None = None

    @property
    def readable(self) -> bool:
        """As what it is made of."""
        return self.of is not None and self.of.readable

    def rows(self, slab_rows: int) -> Iterator[NDArray[np.float32]]:
        """As of any matrix; read whole, for no rows of it lie together."""
        if self.of is None:
            raise AssertionError("a turned tensor of none")
        columns = self.of.shape[1]
        stored = self.of.vector().reshape(-1, self.shape[1], columns)
        whole = np.ascontiguousarray(stored.swapaxes(1, 2)).reshape(self.shape)
        yield from (whole[start : start + slab_rows] for start in range(0, len(whole), slab_rows))


def open_folder(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of a folder by name; model.safetensors is preferred to an index, as in transformers.

    Raises NotAModelError for a folder without safetensors, ConversionError for damaged or missing
    shards, always naming the file.
    """
    if (folder / WEIGHTS).is_file():
        return open_shard(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _open_indexed(folder, folder / INDEX)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise UnsupportedError(
            f"{folder}: found PyTorch pickles, which edgert does not read, expected {WEIGHTS} or {INDEX}; "
            "load the model in transformers and save_pretrained it"
        )
    raise NotAModelError(
        f"{folder}: found neither {WEIGHTS} nor {INDEX}, expected one; download the model's weights"
    )


def shards_of(index: dict[str, Any], path: Path) -> list[str]:
    """The files that an index names, each the plain name of one beside it; ConversionError for others."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise ConversionError(f"{path}: found no weight_map of names to files; {_AGAIN}")
    names = sorted(set(places.values()))
    for name in names:
        # A plain name only: an index must not point the converter at other folders.
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ConversionError(
                f"{path}: found shard {shown(name)}, expected the plain name of a file beside it; {_AGAIN}"
            )
    return names


def _open_indexed(folder: Path, index: Path) -> dict[str, SourceTensor]:
    content = read_object(index)
    names = shards_of(content, index)
    places: dict[str, str] = content["weight_map"]
    shards: dict[str, dict[str, SourceTensor]] = {}
    for name in names:
        if not (folder / name).is_file():
            present = sum((folder / other).is_file() for other in names)
            raise ConversionError(
                f"{folder}: found {present} of {len(names)} shards, {shown(name)} is missing; "
                "download the missing files"
            )
        shards[name] = open_shard(folder / name)
    missing = next((tensor for tensor, shard in places.items() if tensor not in shards[shard]), None)
    if missing is not None:
        raise ConversionError(
            f"{index}: found no {shown(missing)} in {places[missing]}, expected it there; "
            "download the index and its shards again, from one version of the model"
        )
    return {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def open_shard(path: Path) -> dict[str, SourceTensor]:
    """The tensors of one safetensors file; its header is checked, its data not read."""
    return open_with_metadata(path)[0]


def open_with_metadata(path: Path) -> tuple[dict[str, SourceTensor], dict[str, Any]]:
    """As `open_shard`, and what the file says of itself: `__metadata__`, empty if absent."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(max(8, len(_LFS)))
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length) if 8 + length <= size and length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from None
    if start.startswith(_LFS):
        raise ConversionError(
            f"{path}: found a Git LFS pointer, expected the file itself; run git lfs pull in its folder"
        )
    if size < 8 or length > MAX_HEADER_BYTES or not text:
        raise ConversionError(
            f"{path}: found {size:,} bytes and a header said to take {length:,}, "
            f"expected a whole safetensors file; {_AGAIN}"
        )
    header = _parse_header(text, path)
    metadata = header.pop("__metadata__", {})
    return _tensors(header, path, 8 + length, size), metadata if isinstance(metadata, dict) else {}


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError(f"{shown(header)} instead of an object")
    except (ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path}: found a damaged header ({shown(str(error))}), expected a safetensors header; {_AGAIN}"
        ) from None
    return header


def _tensors(header: dict[str, Any], path: Path, data_start: int, size: int) -> dict[str, SourceTensor]:
    tensors = {name: _tensor(name, entry, path, data_start) for name, entry in header.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise ConversionError(
                f"{path}: found {shown(tensor.name)} at byte {tensor.offset}, expected byte {end}; "
                f"its header is damaged, {_AGAIN}"
            )
        end += tensor.nbytes
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise ConversionError(
            f"{path}: found {size:,} bytes, expected {end:,}; the file is {state}, {_AGAIN}"
        )
    return tensors


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> SourceTensor:
    values: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    if isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
        begin, nbytes = offsets[0], offsets[1] - offsets[0]
        item = ITEM_BYTES.get(dtype)  # other types may be there, so long as no tensor of ours has one
        if nbytes >= 0 and (item is None or nbytes == item * math.prod(shape)):
            return SourceTensor(name, path, dtype, tuple(shape), data_start + begin, nbytes)
    raise ConversionError(
        f"{path}: found {shown(entry)} for {shown(name)}, expected a type, a shape and offsets that agree; "
        f"its header is damaged, {_AGAIN}"
    )


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether this is a JSON list of whole numbers >= 0; JSON's true is an int to Python."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _to_float32(raw: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":  # the upper half of a float32
        wide = np.frombuffer(raw, "<u2").astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)
