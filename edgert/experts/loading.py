"""Opening a file whose experts stay on flash: everything else is read into memory, and its mapping left."""

import mmap
from dataclasses import replace

import numpy as np

from edgert.errors import ModelFileError, OptionError
from edgert.experts.store import ExpertStore
from edgert.flash import FileSource, Reading, Source, Streaming
from edgert.flash.reading import Span, read_and_measure
from edgert.format import ErtFile, StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import TOKENIZER
from edgert.format.uses import uses_in
from edgert.state import Weights


def open_streamed(
    file: ErtFile, slots: int, streaming: Streaming, source: Source | None = None
) -> tuple[Weights, ExpertStore]:
    """The weights of a model without its experts, and the store that reads those.

    A mapped file would count what was touched of it as resident, beyond the budget's control; what is
    read here is what the plan counted. It is read in several ways by turns, and the experts then in the
    one that was fastest. Raises ModelFileError where a tensor cannot be read.
    """
    try:
        found = source or FileSource(file.path)
    except OSError as error:
        raise ModelFileError(f"{file.path} cannot be read ({error.strerror}); check its rights") from None
    try:
        held = [t for t in file.tensors.values() if t.role != "expert" and t.name != TOKENIZER]
        memory = mmap.mmap(-1, sum(page_padded(t.nbytes) for t in held))
        spans, tensors = _spans(held, memoryview(memory))
        reading, _ = read_and_measure(found, spans)
        if streaming.readers:
            reading = Reading(streaming.readers, reading.piece)
        weights = Weights(file.spec, np.frombuffer(memory, np.uint8), dict(file.tensors) | tensors)
        uses = uses_in(file.metadata, file.spec) if streaming.pinned else None
        if streaming.pinned and uses is None:
            raise OptionError(
                f"pinned is {streaming.pinned}, but {file.path} does not say which experts are used most; "
                "convert the model with --calibrate, or pin none"
            )
        store = ExpertStore(file.spec, file.tensors, found, slots, streaming, reading=reading, uses=uses)
    except BaseException:
        found.close()
        raise
    return weights, store


def _spans(held: list[StoredTensor], memory: memoryview) -> tuple[list[Span], dict[str, StoredTensor]]:
    """What to read where: tensors that follow each other in the file as one; and their places in memory."""
    spans: list[Span] = []
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for tensor in sorted(held, key=lambda t: t.offset):
        size = page_padded(tensor.nbytes)
        last = spans[-1] if spans else None
        if last is not None and last.offset + len(last.into) == tensor.offset:
            start = at - len(last.into)
            spans[-1] = Span(
                f"{last.name.split(' to ')[0]} to {tensor.name}",
                last.offset,
                memory[start : at + size],
                len(last.into) + tensor.nbytes,
            )
        else:
            spans.append(Span(tensor.name, tensor.offset, memory[at : at + size], tensor.nbytes))
        tensors[tensor.name] = replace(tensor, offset=at)
        at += size
    return spans, tensors
