"""What is not streamed: read into memory, so that the budget counts what is there."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgert.flash.memory import large_pages
from edgert.flash.reading import Reading, Span, read_and_measure
from edgert.flash.source import Source
from edgert.format import ErtFile, StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import TOKENIZER


def read_held(
    file: ErtFile, source: Source, streamed: str
) -> tuple[NDArray[np.uint8], dict[str, StoredTensor], Reading]:
    """All tensors but those of the role `streamed`: their bytes, where each lies in them, and the way of
    reading that was fastest.

    A mapped file would count what was touched of it as resident, beyond the budget's control; what is
    read here is what the plan counted. Raises ModelFileError where a tensor cannot be read.
    """
    held = [t for t in file.tensors.values() if t.role != streamed and t.name != TOKENIZER]
    memory = large_pages(sum(page_padded(t.nbytes) for t in held))
    spans, tensors = _spans(held, memoryview(memory))
    reading, _ = read_and_measure(source, spans)
    return np.frombuffer(memory, np.uint8), tensors, reading


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
