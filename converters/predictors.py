"""Predictors of firing neurons from the file that `edgert train predictor` writes: safetensors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgert.config import MOST_RANK, ModelSpec
from edgert.converters.exits import MODEL_KEY
from edgert.converters.hf_config import shown
from edgert.converters.safetensors_source import SourceTensor, open_with_metadata
from edgert.errors import ConversionError, FormatError
from edgert.format.predictors import PREDICTORS_KEY, read_predictors

_NAME: Final = re.compile(r"layers\.(0|[1-9][0-9]{0,8})\.(predictor_in|predictor_out|predictor_out_bias)")


@dataclass(frozen=True, slots=True)
class TrainedPredictors:
    """Predictors of one model."""

    ranks: tuple[int, ...]  # per layer; 0 for one without
    metadata: str  # what they are worth, for the .ert file
    tensors: dict[str, SourceTensor]


def open_predictors(path: Path, spec: ModelSpec, model: str) -> TrainedPredictors:
    """The predictors in a file, for the model with this spec and this fingerprint.

    Shapes are left to the check of all tensors, but for ranks, which are read from them. Raises
    ConversionError for a file that holds anything else, or the predictors of another model.
    """
    tensors, metadata = open_with_metadata(path)
    matches = [_NAME.fullmatch(name) for name in tensors]
    if not tensors or not all(matches) or not isinstance(metadata.get(PREDICTORS_KEY), str):
        raise ConversionError(
            f"{path}: found {shown(sorted(tensors))}, expected predictors and what they are worth; make them "
            "with `edgert train predictor`"
        )
    layers = {int(match[1]) for match in matches if match}
    if max(layers) >= spec.layers or metadata.get(MODEL_KEY) != model:
        raise ConversionError(
            f"{path}: found predictors of another model than this one of {spec.layers} layers; train them on "
            "this model, or convert it without them"
        )
    ranks = tuple(_rank(path, layer, tensors) if layer in layers else 0 for layer in range(spec.layers))
    try:
        read_predictors(metadata[PREDICTORS_KEY], ranks)
    except FormatError as error:
        raise ConversionError(f"{path}: {error}") from None
    return TrainedPredictors(ranks, metadata[PREDICTORS_KEY], tensors)


def _rank(path: Path, layer: int, tensors: dict[str, SourceTensor]) -> int:
    tensor = tensors.get(f"layers.{layer}.predictor_in")
    rank = tensor.shape[0] if tensor is not None and tensor.shape else 0
    if not 0 < rank <= MOST_RANK or rank % 32:
        raise ConversionError(
            f"{path}: found a predictor of rank {rank} for layer {layer}, expected a multiple of 32 up to "
            f"{MOST_RANK}; make it again with `edgert train predictor`"
        )
    return rank
