"""Opening a file whose experts stay on flash: everything else is read into memory, and its mapping left."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgert.errors import ModelFileError, OptionError
from edgert.experts.store import ExpertStore
from edgert.flash import Joined, Reading, Source, Streaming
from edgert.flash.held import read_held
from edgert.flash.source import open_source
from edgert.format import ErtFile, StoredTensor
from edgert.format.layout import page_padded
from edgert.format.tensors import expert_name, stand_in_name
from edgert.format.uses import uses_in
from edgert.state import Weights


def open_streamed(
    file: ErtFile, slots: int, streaming: Streaming, source: Source | None = None
) -> tuple[Weights, ExpertStore]:
    """The weights of a model without its experts, and the store that reads those.

    The experts are read in the way that was fastest for the rest. Raises ModelFileError where a tensor
    cannot be read, and for stand-ins of another model.
    """
    found = source or open_source(file.path)
    try:
        data, tensors, reading = read_held(file, found, "expert")
        if streaming.readers:
            reading = Reading(streaming.readers, reading.piece)
        streamed = dict(file.tensors)
        if streaming.stand_ins:
            stand_ins = _stand_ins(Path(streaming.stand_ins), file)
            found = Joined(found, open_source(Path(streaming.stand_ins)), page_padded(file.size))
            streamed |= stand_ins
        weights = Weights(file.spec, data, streamed | tensors)
        uses = uses_in(file.metadata, file.spec) if streaming.pinned else None
        if streaming.pinned and uses is None:
            raise OptionError(
                f"pinned is {streaming.pinned}, but {file.path} does not say which experts are used most; "
                "convert the model with --calibrate, or pin none"
            )
        store = ExpertStore(file.spec, streamed, found, slots, streaming, reading=reading, uses=uses)
    except BaseException:
        found.close()
        raise
    return weights, store


def _stand_ins(path: Path, file: ErtFile) -> Mapping[str, StoredTensor]:
    """The experts of another file of the same model, as stand-ins in bytes behind this one's."""
    with ErtFile.open(path) as other:
        same = other.spec == file.spec and all(
            tensor.sha256 == other.tensors[name].sha256
            for name, tensor in file.tensors.items()
            if tensor.role in ("vector", "router")  # float32 in every file: the others differ with their bits
        )
        if not same:
            raise ModelFileError(
                f"{path} holds another model than {file.path}; expected stand-ins for its experts: convert "
                "the same source in fewer bits"
            )
        largest = max(t.nbytes for t in other.tensors.values() if t.role == "expert")
        if largest > max(t.nbytes for t in file.tensors.values() if t.role == "expert"):
            raise ModelFileError(
                f"{path} holds experts of up to {largest} bytes, larger than those of {file.path} they would "
                "stand in for; convert the source in fewer bits"
            )
        return {
            stand_in_name(layer, expert): replace(
                tensor,
                name=f"{tensor.name} in {path.name}",
                offset=page_padded(file.size) + tensor.offset,
            )
            for layer in range(file.spec.layers)
            for expert in range(file.spec.experts if file.spec.has_experts(layer) else 0)
            for tensor in (other.tensors[expert_name(layer, expert)],)
        }
