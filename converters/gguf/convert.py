"""A GGUF file to an .ert file."""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, ModelSpec, Quant, QuantSpec
from edgert.converters.architectures import Decoder
from edgert.converters.gguf.architectures import EXPERT_NAMES, ROPE_FACTORS
from edgert.converters.gguf.config import read_decoder
from edgert.converters.gguf.reader import GgufFile, GgufTensor, open_gguf
from edgert.converters.gguf.types import WEIGHT_TYPES
from edgert.converters.gguf.vocabulary import Vocabulary, read_vocabulary
from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.pipeline import Calibration, quant_spec, quants_of, write_model
from edgert.converters.provenance import provenance
from edgert.converters.quantize import Codes, scaled
from edgert.converters.report import ConversionReport, Progress
from edgert.errors import ConversionError, UnsupportedError
from edgert.format.tensors import declared, iter_declared, matrices_in

SHARED_ROUTER = ".ffn_gate_inp_shexp.weight"  # [D] in the file, a matrix of one row in ours
EXPERT_BIASES = ("_exps.bias",)  # [E, rows], one vector in ours
BY_HEAD = (".attn_k_b.weight", ".attn_v_b.weight")  # [H, rows, columns], one matrix in ours


class GgufWeights:
    """The tensors of a GGUF file under edgert's names: a WeightSource."""

    def __init__(self, decoder: Decoder, tensors: Mapping[str, GgufTensor]) -> None:
        self._decoder = decoder
        self._tensors = tensors

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix in slabs of rows."""
        tensor, factor = self._tensors[self._decoder.source_name(name)], self._decoder.factor(name)
        for start in range(0, tensor.shape[0], slab_rows):
            weights = tensor.kind.weights(tensor.rows(start, min(slab_rows, tensor.shape[0] - start)))
            yield _times(weights, factor)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm, a bias, or what is computed."""
        if name in self._decoder.computed:
            return self._decoder.computed[name]
        values, factor = self._tensors[self._decoder.source_name(name)].vector(), self._decoder.factor(name)
        return scaled(values, factor)

    def stored_as(self, name: str) -> str:
        """GGUF's name of a type, like Q4_K."""
        computed = name in self._decoder.computed
        return "" if computed else self._tensors[self._decoder.source_name(name)].kind.name


def _times(weights: NDArray[np.float32] | Codes, factor: float) -> NDArray[np.float32] | Codes:
    """Weights times a factor; scales and minimums stay float16, so that what ours holds it still holds."""
    if not isinstance(weights, Codes):
        return scaled(weights, factor)
    if factor == 1:
        return weights
    minimums = None if weights.minimums is None else _half(scaled(weights.minimums, factor))
    return Codes(weights.values, _half(scaled(weights.scales, factor)), minimums)


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return values.astype(np.float16).astype(np.float32)


def by_matrix(spec: ModelSpec, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """The tensors with those of all experts of a layer cut into one for each, and vectors that are rows."""
    return dict(_cut(spec, tensors))


def _cut(spec: ModelSpec, tensors: Mapping[str, GgufTensor]) -> Iterator[tuple[str, GgufTensor]]:
    for name, tensor in tensors.items():
        if name.endswith(tuple(EXPERT_NAMES.values())) and tensor.shape[0] == spec.experts > 0:
            for expert in range(spec.experts if len(tensor.shape) == 3 else 0):
                part = tensor.part(expert)
                yield part.name, part
        elif name.endswith(EXPERT_BIASES):
            yield name, replace(tensor, shape=(math.prod(tensor.shape),))
        elif name.endswith(BY_HEAD) and len(tensor.shape) == 3:
            yield name, replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
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
    dry_run: bool = False,
) -> ConversionReport:
    """Convert a GGUF file, or a split one given any of its parts, one slab of rows in memory at a time.

    Without `quant` a matrix keeps its type where ours holds it, Q4_0 and Q8_0 bit for bit; others
    become q8, whose error is below that of the products themselves. Raises as `edgert.converters.convert`.
    """
    file = open_gguf(Path(path))
    vocabulary = read_vocabulary(file)
    decoder = read_decoder(file, vocabulary.eos_ids)
    layout = decoder.variant.layout
    file = replace(file, tensors=layout.split(by_matrix(decoder.spec, file.tensors), decoder.spec))
    check_tensors(decoder, file)
    if quant is None:
        quants = _kept(decoder, file.tensors)
    else:
        quants = quants_of(decoder.spec, quant_spec(quant))
    weights = GgufWeights(decoder, file.tensors)
    metadata = _metadata(file, vocabulary)
    tokenizer = vocabulary.tokenizer_json
    return write_model(
        Path(out), decoder.spec, weights, quants, tokenizer, metadata, progress, calibration, dry_run
    )


def _kept(decoder: Decoder, tensors: Mapping[str, GgufTensor]) -> dict[str, Quant]:
    """The type each matrix keeps; the three of an expert, stored as one, take the most precise of theirs."""
    found: dict[str, Quant] = {}
    for decl in declared(decoder.spec):
        if decl.role in ("matrix", "expert"):
            kinds = {tensors[decoder.source_name(name)].kind.kept_as for name, _, _ in matrices_in(decl)}
            found[decl.name] = next(quant for quant in QUANTS if quant in kinds)  # most precise first
    return found


def check_tensors(decoder: Decoder, file: GgufFile) -> None:
    """Every tensor of the spec is there, in its shape and a type we read, and no other is."""
    spec = decoder.spec
    strangers = set(file.tensors) - {ROPE_FACTORS, *decoder.variant.layout.ignored}
    for decl in iter_declared(spec):
        if decl.name in decoder.computed:
            continue
        parts: list[tuple[str, tuple[int, ...]]] = [(part, (n, k)) for part, n, k in matrices_in(decl)]
        for part, shape in parts or [(decl.name, decl.shape)]:
            name = decoder.source_name(part)
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
