"""The initialisers of an ONNX model: in the file itself, or mapped from a file beside it."""

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.hf_config import shown
from edgert.errors import ConversionError, UnsupportedError

# The numbers of TensorProto.DataType (onnx.proto) and how NumPy reads their bytes; bfloat16 as the upper
# half of a float32.
TYPES: Final = {
    1: ("FLOAT", "<f4"),
    2: ("UINT8", "|u1"),
    3: ("INT8", "|i1"),
    6: ("INT32", "<i4"),
    7: ("INT64", "<i8"),
    9: ("BOOL", "|b1"),
    10: ("FLOAT16", "<f2"),
    11: ("DOUBLE", "<f8"),
    16: ("BFLOAT16", "<u2"),
}
FLOATS: Final = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
EXTERNAL: Final = 1  # TensorProto.DataLocation
_AGAIN: Final = "download the model's files again"


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """An initialiser; `data` is mapped where it lies in a file of its own."""

    name: str
    kind: str  # ONNX's name of its type, like FLOAT16
    data: NDArray[Any]  # in its shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions, the outermost first."""
        return self.data.shape

    def floats(self) -> NDArray[np.float32]:
        """All of it, for a vector; a matrix is read in slabs."""
        return to_float32(self.data, self.kind)


def to_float32(data: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """Values of one of FLOATS as float32; contiguous."""
    if kind == "BFLOAT16":
        wide = data.astype(np.uint32) << np.uint32(16)
        floats: NDArray[np.float32] = wide.view(np.float32)
        return floats
    with np.errstate(invalid="ignore"):  # a damaged file may hold a signalling NaN
        return np.ascontiguousarray(data, np.float32)


class ExternalFiles:
    """The files beside a model, each mapped once; none outside its folder, and no links."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._mapped: dict[str, NDArray[np.uint8]] = {}

    def bytes_of(self, name: str, location: str, offset: int, length: int) -> NDArray[np.uint8]:
        """`length` bytes from `offset` of the file at `location`, which tensor `name` names."""
        data = self._mapped.get(location)
        if data is None:
            data = self._mapped[location] = self._map(name, location)
        if not 0 <= offset <= offset + length <= len(data):
            raise ConversionError(
                f"{self._model}: found {shown(name)} at bytes {offset:,} to {offset + length:,} of "
                f"{shown(location)}, expected it within its {len(data):,} bytes; {_AGAIN}"
            )
        return data[offset : offset + length]

    def _map(self, name: str, location: str) -> NDArray[np.uint8]:
        parts = PurePosixPath(location).parts
        if not parts or location.startswith("/") or ".." in parts or "\\" in location or "\0" in location:
            raise ConversionError(
                f"{self._model}: found {shown(name)} in {shown(location)}, expected a file in the model's "
                "folder; do not convert models of strangers that name other files"
            )
        path = self._model.parent
        try:
            for part in parts:
                path = path / part
                if stat.S_ISLNK(path.lstat().st_mode):
                    raise ConversionError(
                        f"{path}: found a link, expected the weights of {self._model.name} themselves; "
                        "copy the model with cp -RL and convert the copy"
                    )
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise ConversionError(f"{path}: found no plain file, expected weights; {_AGAIN}")
                if found.st_size == 0:
                    return np.empty(0, np.uint8)
                return np.memmap(file, np.uint8, "r")
        except OSError as error:
            raise ConversionError(
                f"{path}: cannot be read ({error.strerror}), expected weights of {self._model.name} there; "
                f"{_AGAIN}"
            ) from None
        except ValueError:
            raise ConversionError(f"{self._model}: found the file name {shown(location)}; {_AGAIN}") from None


def read_tensor(proto: Any, files: ExternalFiles, path: Path) -> OnnxTensor:
    """The tensor of a TensorProto. Raises ConversionError where type, shape and bytes do not agree."""
    shape = tuple(proto.dims)
    if proto.data_type not in TYPES:
        raise UnsupportedError(
            f"{path}: found {shown(proto.name)} of data type {proto.data_type}, expected "
            f"{', '.join(name for name, _ in TYPES.values())}; export the model in another precision"
        )
    kind, code = TYPES[proto.data_type]
    dtype = np.dtype(code)
    # The product as a whole number of Python: 64 bits would wrap around.
    nbytes = math.prod(shape) * dtype.itemsize
    if len(shape) > 8 or any(size < 0 for size in shape) or nbytes > 1 << 48:
        raise _damaged(path, proto.name, f"of shape {shown(shape)}")
    if proto.data_location == EXTERNAL:
        place = {entry.key: entry.value for entry in proto.external_data}
        offset = _whole(path, proto.name, place, "offset", 0)
        if _whole(path, proto.name, place, "length", nbytes) != nbytes:
            raise _damaged(path, proto.name, f"of shape {shown(shape)} in {shown(place.get('length'))} bytes")
        raw = files.bytes_of(proto.name, place.get("location", ""), offset, nbytes)
        return OnnxTensor(proto.name, kind, raw.view(dtype).reshape(shape))
    if proto.HasField("raw_data"):
        if len(proto.raw_data) != nbytes:
            raise _damaged(path, proto.name, f"of shape {shown(shape)} in {len(proto.raw_data):,} bytes")
        return OnnxTensor(proto.name, kind, np.frombuffer(proto.raw_data, dtype).reshape(shape))
    return OnnxTensor(proto.name, kind, _listed(proto, shape, kind, dtype, path))


def _listed(proto: Any, shape: tuple[int, ...], kind: str, dtype: np.dtype[Any], path: Path) -> NDArray[Any]:
    """Values listed number by number; 16-bit floats as the whole numbers of their bits."""
    field = {"FLOAT": proto.float_data, "DOUBLE": proto.double_data, "INT64": proto.int64_data}
    values = field.get(kind, proto.int32_data)
    if len(values) != math.prod(shape):
        raise _damaged(path, proto.name, f"of shape {shown(shape)} with {len(values):,} values")
    if kind in ("FLOAT16", "BFLOAT16"):
        return np.array(values, np.int64).astype("<u2").view(dtype).reshape(shape)
    # A number too large for its type is damage, found later as a wrong weight or not at all: wrap.
    wide = np.array(values, np.float64 if kind in ("FLOAT", "DOUBLE") else np.int64)
    with np.errstate(all="ignore"):
        return wide.astype(dtype).reshape(shape)


def _whole(path: Path, name: str, place: Mapping[str, str], key: str, default: int) -> int:
    text = place.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise _damaged(path, name, f"with {key} {shown(text)}")
    return int(text)


def _damaged(path: Path, name: str, found: str) -> ConversionError:
    return ConversionError(
        f"{path}: found {shown(name)} {found}, expected a shape and bytes that agree; {_AGAIN}"
    )
