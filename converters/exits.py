"""Exit heads from the file that `edgert train exits` writes: safetensors, named as in an .ert file."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgert.config import ModelSpec
from edgert.converters.hf_config import shown
from edgert.converters.safetensors_source import SourceTensor, open_with_metadata
from edgert.errors import ConversionError, FormatError
from edgert.format import ExitCalibration
from edgert.format.exits import EXITS_KEY, read_exits

EXITS_FILE: Final = "exits.safetensors"  # taken by default where a model's folder has it
MODEL_KEY: Final = "model"  # of __metadata__: the fingerprint of the model the heads were trained on
_NAME: Final = re.compile(r"exits\.([1-9][0-9]{0,8})\.(norm|matrix|output_norm)")


@dataclass(frozen=True, slots=True)
class Exits:
    """Trained exit heads of one model."""

    calibration: dict[int, ExitCalibration]  # by the layers before each exit
    metadata: str  # the same as text, for the .ert file
    tensors: dict[str, SourceTensor]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers after which the heads sit, ascending."""
        return tuple(sorted(self.calibration))


def fingerprint(output_norm: SourceTensor) -> str:
    """Names the weights of a model by those of its last norm: SHA-256 of their float32 values."""
    return hashlib.sha256(output_norm.vector().astype("<f4").tobytes()).hexdigest()


def open_exits(path: Path, spec: ModelSpec, model: str) -> Exits:
    """The heads in a file, for the model with this spec and this fingerprint.

    Shapes are left to the check of all tensors. Raises ConversionError for a file that holds anything
    else, or the heads of another model.
    """
    tensors, metadata = open_with_metadata(path)
    matches = [_NAME.fullmatch(name) for name in tensors]
    if not tensors or not all(matches) or not isinstance(metadata.get(EXITS_KEY), str):
        raise ConversionError(
            f"{path}: found {shown(sorted(tensors))}, expected exit heads and their calibration; "
            "make them with `edgert train exits`"
        )
    layers = tuple(sorted({int(match[1]) for match in matches if match}))
    if layers[-1] >= spec.layers or metadata.get(MODEL_KEY) != model:
        raise ConversionError(
            f"{path}: found exits after layers {list(layers)} of another model than this one of "
            f"{spec.layers} layers; train exits on this model, or convert it without them"
        )
    try:
        return Exits(read_exits(metadata[EXITS_KEY], layers), metadata[EXITS_KEY], tensors)
    except FormatError as error:
        raise ConversionError(f"{path}: {error}") from None
