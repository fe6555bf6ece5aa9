"""The .ert file: what it holds, and how it is written, read and verified (docs/format.md)."""

from edgert.format.exits import ExitCalibration
from edgert.format.reader import ErtFile
from edgert.format.tensors import StoredTensor, TensorDecl, declared
from edgert.format.writer import ErtWriter

__all__ = ["ErtFile", "ErtWriter", "ExitCalibration", "StoredTensor", "TensorDecl", "declared"]
