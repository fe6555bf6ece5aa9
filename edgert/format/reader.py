"""Opening an .ert file: mapped, never copied, and fully validated first."""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgert.config import ModelSpec
from edgert.errors import ModelFileError
from edgert.format.exits import ExitCalibration
from edgert.format.foreign import open_regular, reject_foreign
from edgert.format.inputs import InputThresholds
from edgert.format.outliers import check_outliers
from edgert.format.predictors import Predictors
from edgert.format.sparsity import SparsityCalibration
from edgert.format.tensors import TOKENIZER, StoredTensor
from edgert.format.validate import Contents, read_contents


class ErtFile:
    """A valid .ert file, mapped read-only. Use as a context manager, or call `close`.

    Made by `ErtFile.open`. Views of `data` stay usable after `close`: the mapping goes with
    the last of them.
    """

    __slots__ = (
        *("_mapping", "data", "exits", "inputs", "metadata", "path", "predictors", "size", "sparsity"),
        *("spec", "tensors"),
    )

    def __init__(self, path: Path, mapping: mmap.mmap, contents: Contents) -> None:
        self._mapping = mapping
        self.path = path
        self.size = len(mapping)  # bytes
        self.data: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)  # [size], the whole file
        self.spec: ModelSpec = contents.spec
        self.tensors: dict[str, StoredTensor] = contents.tensors  # in order of use
        self.metadata: dict[str, str] = contents.metadata  # chat_template, source, converter, ...
        self.exits: dict[int, ExitCalibration] = contents.exits  # by the layers before each
        self.sparsity: SparsityCalibration | None = contents.sparsity
        self.inputs: InputThresholds | None = contents.inputs
        self.predictors: Predictors | None = contents.predictors

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ErtFile":
        """Map and validate a file.

        Checks every rule of docs/format.md but the checksums, which `edgert.format.verify`
        checks. Raises NotAModelError, VersionError, or FormatError naming the broken rule.
        """
        path = Path(path)
        try:
            mapping = _map(path)
            try:
                reject_foreign(mapping, path)
                contents = read_contents(mapping, path)
            except BaseException:
                mapping.close()
                raise
            file = cls(path, mapping, contents)
            check_outliers(file.spec, file.tensors, file.data)
            return file
        except ModelFileError as error:
            error.args = (f"{path}: {error}",)  # the checks below do not know the file's name
            raise

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, without the padding: a view, uint8 [nbytes]."""
        tensor = self.tensors[name]
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]

    def tokenizer_json(self) -> bytes | None:
        """A copy of the stored tokenizer.json; None for a file without one."""
        return self.raw(TOKENIZER).tobytes() if TOKENIZER in self.tensors else None

    def close(self) -> None:
        """Give the mapping back, now or when the last view of it dies."""
        self.data = np.empty(0, np.uint8)
        with suppress(BufferError):
            self._mapping.close()

    def __enter__(self) -> "ErtFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map(path: Path) -> mmap.mmap:
    descriptor = open_regular(path)
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"cannot be mapped ({error}); check the file and the free address space"
        ) from None
    finally:
        os.close(descriptor)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel or a file system without large pages for files
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
