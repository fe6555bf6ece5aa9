"""The source model at work: its logits, computed by onnxruntime."""

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.hf_config import shown
from edgert.converters.onnx.decoder import find_decoder
from edgert.converters.onnx.graph import open_graph
from edgert.errors import ConversionError, UnsupportedError

_TYPES: Final = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def onnx_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """The logits [T, V] of a model for T token ids, read in one run without any cache before them.

    Raises ConversionError where onnxruntime is missing or refuses, and what a conversion raises.
    """
    graph = open_graph(path)
    found = find_decoder(graph)
    try:
        import onnxruntime
    except ImportError:
        raise ConversionError(
            f"{path}: found no package onnxruntime to run it; install it: pip install 'edgert[convert]'"
        ) from None
    attention = found.layers[0].attention
    cache = {1: attention.kv_heads, 3: attention.q.matrix.count // attention.heads}
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its own lines about a model would hide ours
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {
            given.name: _feed(path, given, found.tokens, tokens, cache) for given in session.get_inputs()
        }
        first = next(made for made in session.get_outputs() if len(made.shape) == 3)
        (logits,) = session.run([first.name], feeds)
    except (ConversionError, KeyboardInterrupt):
        raise
    except Exception as error:  # onnxruntime has a class for each of its states, and no base class
        raise ConversionError(
            f"{path}: onnxruntime cannot run it ({shown(str(error))}); check the export"
        ) from None
    if logits.shape[:2] != (1, len(tokens)):
        raise UnsupportedError(
            f"{path}: found logits of shape {list(logits.shape)} for {len(tokens)} tokens, expected a row "
            "for each; export the model with logits of all positions to compare it"
        )
    return np.asarray(logits[0], np.float32)


def _feed(path: Path, given: Any, ids: str, tokens: list[int], cache: dict[int, int]) -> NDArray[Any]:
    """One input: the tokens, their positions, a mask of ones, or an empty cache that is not used."""
    if given.type == "tensor(bool)" and len(given.shape) == 1:  # of a merged decoder: whether to use caches
        return np.array([False])
    kind = _TYPES.get(given.type)
    if kind is not None and given.name == ids:
        return np.array([tokens], kind)
    if kind is not None and len(given.shape) == 2:
        row = np.arange(len(tokens)) if "pos" in given.name.lower() else np.ones(len(tokens))
        return row[None].astype(kind)
    if kind is not None and len(given.shape) == 4:
        return np.zeros([cache.get(axis, 1 if axis == 0 else 0) for axis in range(4)], kind)
    raise UnsupportedError(
        f"{path}: found input {shown(given.name)} of type {given.type} and shape {shown(given.shape)}, "
        "expected token ids, positions, a mask or a cache; it can be converted but not compared"
    )
