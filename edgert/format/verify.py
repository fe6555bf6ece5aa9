"""Whether the tensors of a file are the bytes that were written."""

import hashlib
import os
from collections.abc import Iterator

from edgert.errors import ChecksumError
from edgert.format.layout import page_padded
from edgert.format.reader import ErtFile
from edgert.format.tensors import StoredTensor


def verify(file: ErtFile) -> Iterator[tuple[str, bool]]:
    """Hash the tensors one by one: (name, whether its bytes and its padding are intact)."""
    for tensor in file.tensors.values():
        yield tensor.name, _intact(file, tensor)


def check(path: str | os.PathLike[str]) -> int:
    """The number of tensors of an intact file.

    Raises ChecksumError naming the first damaged tensor, and what `ErtFile.open` raises.
    """
    with ErtFile.open(path) as file:
        damaged = [name for name, good in verify(file) if not good]
        if damaged:
            raise ChecksumError(
                f"{file.path}: found other bytes than were written in {damaged[0]} "
                f"({len(damaged)} of {len(file.tensors)} tensors damaged), expected their SHA-256; "
                "copy the file again or convert the model again"
            )
        return len(file.tensors)


def _intact(file: ErtFile, tensor: StoredTensor) -> bool:
    end = tensor.offset + tensor.nbytes
    padding = file.data[end : tensor.offset + page_padded(tensor.nbytes)]
    digest = hashlib.sha256(file.raw(tensor.name).data).hexdigest()
    return digest == tensor.sha256 and not padding.any()
