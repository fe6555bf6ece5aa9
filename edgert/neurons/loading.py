"""Opening a file whose neurons stay on flash: everything else is read into memory, and its mapping left."""

from dataclasses import fields

from edgert.errors import OptionError
from edgert.flash import Source, Streaming
from edgert.flash.held import read_held
from edgert.flash.source import open_source
from edgert.format import ErtFile
from edgert.neurons.store import DEFAULT_READS, NeuronStore, Reads
from edgert.state import Weights

_CHOICES = ("overlap", "pinned", "readers")
"""The fields of Streaming that neurons have; the others are of experts."""


def open_streamed(
    file: ErtFile,
    slots: int,
    streaming: Streaming,
    source: Source | None = None,
    reads: Reads = DEFAULT_READS,
) -> tuple[Weights, NeuronStore]:
    """The weights of a model without its neurons, and the store that reads those.

    Raises ModelFileError where something cannot be read, OptionError for what neurons do not have.
    """
    for field in fields(Streaming):
        value = getattr(streaming, field.name)
        if field.name not in _CHOICES and value != field.default:
            raise OptionError(
                f"{field.name} is {value!r}, but {file.path} has no experts; of its neurons can be chosen: "
                f"{', '.join(_CHOICES)}"
            )
    if streaming.pinned and file.sparsity is None:
        raise OptionError(
            f"pinned is {streaming.pinned}, but {file.path} does not have the neurons that fire most first; "
            "convert the model with --calibrate, or pin none"
        )
    found = source or open_source(file.path)
    try:
        data, tensors, _ = read_held(file, found, "neurons")
        store = NeuronStore(file.spec, file.tensors, found, slots, streaming, reads)
    except BaseException:
        found.close()
        raise
    return Weights(file.spec, data, dict(file.tensors) | tensors, store.layers), store
