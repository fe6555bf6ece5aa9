"""Opening a file whose experts stay on flash: everything else is read into memory, and its mapping left."""

import mmap
from dataclasses import replace

import numpy as np

from edgert.errors import ModelFileError
from edgert.experts.config import Streaming
from edgert.experts.segments import FileSegments, Segments
from edgert.experts.store import ExpertStore
from edgert.format import ErtFile, StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import TOKENIZER
from edgert.state import Weights


def open_streamed(
    file: ErtFile, slots: int, streaming: Streaming, segments: Segments | None = None
) -> tuple[Weights, ExpertStore]:
    """The weights of a model without its experts, and the store that reads those.

    A mapped file would count what was touched of it as resident, beyond the budget's control; what is
    read here is what the plan counted. Raises ModelFileError where a tensor cannot be read.
    """
    try:
        source = segments or FileSegments(file.path)
    except OSError as error:
        raise ModelFileError(f"{file.path} cannot be read ({error.strerror}); check its rights") from None
    held = [t for t in file.tensors.values() if t.role != "expert" and t.name != TOKENIZER]
    memory = mmap.mmap(-1, sum(page_padded(t.nbytes) for t in held))
    tensors = dict(file.tensors)
    at = 0
    for tensor in held:
        size = page_padded(tensor.nbytes)
        _read(source, file, tensor, memoryview(memory)[at : at + size])
        tensors[tensor.name] = replace(tensor, offset=at)
        at += size
    weights = Weights(file.spec, np.frombuffer(memory, np.uint8), tensors)
    return weights, ExpertStore(file.spec, file.tensors, source, slots, streaming)


def _read(source: Segments, file: ErtFile, tensor: StoredTensor, into: memoryview) -> None:
    try:
        count = source.read(tensor.offset, into)
    except OSError as error:
        raise ModelFileError(
            f"{file.path}: {tensor.name} cannot be read ({error.strerror or error}); check the disk"
        ) from None
    if count < tensor.nbytes:
        raise ModelFileError(
            f"{file.path}: found {count} bytes of {tensor.name}, expected {tensor.nbytes}; "
            "copy the file again"
        )
