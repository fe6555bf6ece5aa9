"""A GGUF file to an .ert file."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, ModelSpec, Quant, QuantSpec
from edgert.converters.architectures import Decoder
from edgert.converters.gguf.architectures import ARCHITECTURES, EXPERT_NAMES, ROPE_FACTORS, gguf_name
from edgert.converters.gguf.config import read_decoder
from edgert.converters.gguf.reader import GgufFile, GgufTensor, open_gguf
from edgert.converters.gguf.types import WEIGHT_TYPES
from edgert.converters.gguf.vocabulary import Vocabulary, read_vocabulary
from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.pipeline import ROPE, Calibration, quant_spec, quants_of, write_model
from edgert.converters.provenance import provenance
from edgert.converters.quantize import Codes
from edgert.converters.report import ConversionReport, Progress
from edgert.errors import ConversionError, UnsupportedError
from edgert.format.tensors import declared, iter_declared, matrices_in

INTERLEAVED = frozenset(
    name for known in ARCHITECTURES.values() if known.interleaved for name in (known.dense, known.experts)
)
SHARED_ROUTER = ".ffn_gate_inp_shexp.weight"  # [D] in the file, a matrix of one row in ours
REORDERED = frozenset({"q", "q_bias", "k", "k_bias"})
"""The tensors whose rows llama.cpp's converter reorders for an interleaved rotary embedding."""


def halves_apart(rows: NDArray[np.int64], head_dim: int) -> NDArray[np.int64]:
    """Where rows of q or k lie in a file that keeps the rotary pair (i, i + d/2) side by side."""
    head, place = rows // head_dim, rows % head_dim
    half, pair = place // (head_dim // 2), place % (head_dim // 2)
    return head * head_dim + 2 * pair + half


class GgufWeights:
    """The tensors of a GGUF file under edgert's names: a WeightSource."""

    def __init__(self, decoder: Decoder, tensors: Mapping[str, GgufTensor]) -> None:
        self._decoder = decoder
        self._tensors = tensors

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix in slabs of rows."""
        tensor = self._tensors[gguf_name(name)]
        for start in range(0, tensor.shape[0], slab_rows):
            end = min(start + slab_rows, tensor.shape[0])
            yield tensor.kind.weights(self._bytes(name, tensor, start, end))

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm, a bias, or the rotary frequencies."""
        if name in self._decoder.computed:
            return self._decoder.computed[name]
        values = self._tensors[gguf_name(name)].vector()
        if not self._is_reordered(name):
            return values
        return values[halves_apart(np.arange(len(values)), self._decoder.spec.head_dim)]

    def stored_as(self, name: str) -> str:
        """GGUF's name of a type, like Q4_K."""
        return "" if name in self._decoder.computed else self._tensors[gguf_name(name)].kind.name

    def _bytes(self, name: str, tensor: GgufTensor, start: int, end: int) -> NDArray[np.uint8]:
        if not self._is_reordered(name):
            return tensor.rows(start, end - start)
        # A row's place is within its own head: the whole heads around the slab have them all.
        head_dim = self._decoder.spec.head_dim
        first, last = start // head_dim * head_dim, -(-end // head_dim) * head_dim
        found: NDArray[np.uint8] = tensor.rows(first, last - first)
        return found[halves_apart(np.arange(start, end), head_dim) - first]

    def _is_reordered(self, name: str) -> bool:
        return self._decoder.spec.architecture in INTERLEAVED and name.split(".")[-1] in REORDERED


def by_matrix(spec: ModelSpec, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """The tensors with those of all experts of a layer cut into one for each, and vectors that are rows."""
    return dict(_cut(spec, tensors))


def _cut(spec: ModelSpec, tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, GgufTensor]]:
    for name, tensor in tensors.items():
        if name.endswith(tuple(EXPERT_NAMES.values())) and tensor.shape[0] == spec.experts > 0:
            for expert in range(spec.experts if len(tensor.shape) == 3 else 0):
                part = tensor.part(expert)
                yield part.name, part
        elif name.endswith(SHARED_ROUTER) and len(tensor.shape) == 1:
            yield name, replace(tensor, shape=(1, *tensor.shape))
        else:
            yield name, tensor


def convert_gguf(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: Quant | QuantSpec | None = None,
    *,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> ConversionReport:
    """Convert a GGUF file, or a split one given any of its parts, one slab of rows in memory at a time.

    Without `quant` a matrix keeps its type where ours holds it, Q4_0 and Q8_0 bit for bit; others
    become q8, whose error is below that of the products themselves. Raises as `edgert.converters.convert`.
    """
    file = open_gguf(Path(path))
    vocabulary = read_vocabulary(file)
    decoder = read_decoder(file, vocabulary.eos_ids)
    file = replace(file, tensors=by_matrix(decoder.spec, file.tensors))
    check_tensors(decoder.spec, file)
    if quant is None:
        quants = _kept(decoder.spec, file.tensors)
    else:
        quants = quants_of(decoder.spec, quant_spec(quant))
    weights = GgufWeights(decoder, file.tensors)
    metadata = _metadata(file, vocabulary)
    tokenizer = vocabulary.tokenizer_json
    return write_model(Path(out), decoder.spec, weights, quants, tokenizer, metadata, progress, calibration)


def _kept(spec: ModelSpec, tensors: Mapping[str, GgufTensor]) -> dict[str, Quant]:
    """The type each matrix keeps; the three of an expert, stored as one, take the most precise of theirs."""
    found: dict[str, Quant] = {}
    for decl in declared(spec):
        if decl.role in ("matrix", "expert"):
            kinds = {tensors[gguf_name(name)].kind.kept_as for name, _, _ in matrices_in(decl)}
            found[decl.name] = next(quant for quant in QUANTS if quant in kinds)  # most precise first
    return found


def check_tensors(spec: ModelSpec, file: GgufFile) -> None:
    """Every tensor of the spec is there, in its shape and a type we read, and no other is."""
    strangers = set(file.tensors) - {ROPE_FACTORS}
    for decl in iter_declared(spec):
        if decl.name == ROPE:
            continue
        parts: list[tuple[str, tuple[int, ...]]] = [(part, (n, k)) for part, n, k in matrices_in(decl)]
        for part, shape in parts or [(decl.name, decl.shape)]:
            name = gguf_name(part)
            _check_tensor(shape, name, file)
            strangers.discard(name)
    if strangers:
        raise UnsupportedError(
            f"{file.path}: found {len(strangers)} tensors that {spec.architecture} does not have, first "
            f"{shown(min(strangers))}, expected none; convert a model without adapters or extra heads"
        )


def _check_tensor(shape: tuple[int, ...], name: str, file: GgufFile) -> None:
    found = file.tensors.get(name)
    if found is None:
        raise ConversionError(
            f"{file.path}: found no tensor {name}, expected one of shape {list(shape)}; "
            "download the file again"
        )
    if found.kind.decode is None:
        raise UnsupportedError(
            f"{found.path}: found {name} as {found.kind.name}, expected {', '.join(WEIGHT_TYPES)}; "
            "convert a version of the model quantised otherwise"
        )
    if found.shape != shape:
        raise ConversionError(
            f"{found.path}: found {name} of shape {list(found.shape)}, expected {list(shape)} from "
            "the file's metadata; download the file again"
        )


def _metadata(file: GgufFile, vocabulary: Vocabulary) -> dict[str, str]:
    metadata = provenance(file.path)
    template = HfConfig(file.metadata, str(file.path)).text("tokenizer.chat_template", "")
    optional = {
        "chat_template": template,
        "bos_token": vocabulary.bos_token,
        "eos_token": vocabulary.eos_token,
    }
    return metadata | {key: text for key, text in optional.items() if text}
