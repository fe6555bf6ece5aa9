"""Hugging Face folders: config.json, safetensors, tokenizer.json and the chat template."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec, Quant, QuantSpec
from edgert.converters.architectures import Decoder, describe
from edgert.converters.exits import EXITS_FILE, Exits, fingerprint, open_exits
from edgert.converters.fp8 import with_scales, without_blocks
from edgert.converters.hf_config import HfConfig, parse_object, read_bytes, read_object, shown
from edgert.converters.neurons import Sparsity, with_sparsity
from edgert.converters.outliers import with_outliers
from edgert.converters.pipeline import Calibration, quant_spec, quants_of, write_model
from edgert.converters.predictors import TrainedPredictors, open_predictors
from edgert.converters.provenance import provenance
from edgert.converters.quantize import Codes, scaled
from edgert.converters.report import ConversionReport, Progress
from edgert.converters.safetensors_source import ITEM_BYTES, SourceTensor, open_folder
from edgert.converters.sentencepiece import MODEL, tokenizer_of
from edgert.errors import ConversionError, NotAModelError, UnsupportedError
from edgert.format.exits import EXITS_KEY
from edgert.format.predictors import PREDICTORS_KEY
from edgert.format.tensors import iter_declared, matrices_in


class HfWeights:
    """The tensors of a folder under edgert's names: a WeightSource."""

    def __init__(self, decoder: Decoder, tensors: dict[str, SourceTensor]) -> None:
        self._decoder = decoder
        self._tensors = tensors

    def rows(self, name: str, slab_rows: int) -> Iterator[NDArray[np.float32] | Codes]:
        """A matrix in slabs of rows."""
        factor = self._decoder.factor(name)
        for slab in self._tensors[self._decoder.source_name(name)].rows(slab_rows):
            if isinstance(slab, Codes) and factor == 1:
                yield slab
            else:
                yield scaled(slab.floats() if isinstance(slab, Codes) else slab, factor)

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm, a bias, or the rotary frequencies."""
        if name in self._decoder.computed:
            return self._decoder.computed[name]
        values = self._tensors[self._decoder.source_name(name)].vector()
        return scaled(values, self._decoder.factor(name), self._decoder.offset(name))

    def stored_as(self, name: str) -> str:
        """safetensors' name of a type, like BF16."""
        computed = name in self._decoder.computed
        return "" if computed else self._tensors[self._decoder.source_name(name)].dtype


def convert_hf(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: Quant | QuantSpec = "q4",
    *,
    exits: str | os.PathLike[str] | None = None,
    predictor: str | os.PathLike[str] | None = None,
    sparsity: Sparsity = "auto",
    outliers: int = 0,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
) -> ConversionReport:
    """Convert a Hugging Face folder to an .ert file, one slab of rows in memory at a time.

    sparsity: "exact" stores the feed-forward neuron by neuron, so that those that do not fire are not
    read; "auto" does so where many do not, "none" never. outliers: columns of every matrix apart in 8 bits.
    exits: the file of `edgert train exits`; None for the folder's own exits.safetensors, if it has one.
    predictor: the file of `edgert train predictor`: gates are stored row by row, to be read where it says so.
    Everything that can be known without reading weights is checked before the first is written.
    Raises NotAModelError for a folder that holds no model, UnsupportedError for one that edgert
    cannot run, ConversionError for damaged files and a full disk, OptionError for `quant`.
    """
    folder, quant = Path(folder), quant_spec(quant)
    decoder, tensors = _open(folder)
    metadata = metadata_of(folder)
    heads = _exits(folder, exits, decoder, tensors)
    if heads is not None:
        decoder = replace(decoder, spec=replace(decoder.spec, exits=heads.layers))
        tensors, metadata = tensors | heads.tensors, metadata | {EXITS_KEY: heads.metadata}
        _check_tensors(decoder, tensors, folder)
    tokenizer = tokenizer_json_in(folder)
    foretold = _predictors(predictor, decoder, tensors)
    ranks = foretold.ranks if foretold is not None else ()
    calibrated = calibration is not None or dry_run  # a plan asks for no numbers
    if outliers and sparsity == "auto":
        sparsity = "none"  # a file has one of the two
    spec = with_sparsity(decoder.spec, quant.matrices, sparsity, calibrated, ranks)
    decoder = replace(decoder, spec=with_outliers(spec, outliers, calibrated))
    if foretold is not None:
        own = {decoder.source_name(name): tensor for name, tensor in foretold.tensors.items()}
        tensors, metadata = tensors | own, metadata | {PREDICTORS_KEY: foretold.metadata}
        _check_tensors(decoder, tensors, folder)
    weights = HfWeights(decoder, tensors)
    quants = quants_of(decoder.spec, quant)
    return write_model(
        Path(out), decoder.spec, weights, quants, tokenizer, metadata, progress, calibration, dry_run
    )


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of a folder before its weights are read."""

    spec: ModelSpec
    fingerprint: str  # names the model's weights (see converters/exits.py)


def describe_folder(folder: str | os.PathLike[str]) -> Description:
    """The model in a Hugging Face folder, checked as for a conversion; raises what `convert_hf` raises."""
    folder = Path(folder)
    decoder, tensors = _open(folder)
    tokenizer_json_in(folder)
    return Description(decoder.spec, fingerprint(tensors[decoder.source_name("output_norm")]))


def _open(folder: Path) -> tuple[Decoder, dict[str, SourceTensor]]:
    """What the folder's config.json describes, and its tensors, all of which are there."""
    if not (folder / "config.json").is_file():
        raise NotAModelError(
            f"{folder}: found no config.json, expected a Hugging Face model folder; "
            "check the path or download the model"
        )
    tensors = open_folder(folder)
    decoder, tensors = _decoder(folder, tensors)
    _check_tensors(decoder, tensors, folder)
    return decoder, tensors


def _exits(
    folder: Path, given: str | os.PathLike[str] | None, decoder: Decoder, tensors: dict[str, SourceTensor]
) -> Exits | None:
    path = folder / EXITS_FILE if given is None else Path(given)
    if given is None and not path.is_file():
        return None
    return open_exits(path, decoder.spec, fingerprint(tensors[decoder.source_name("output_norm")]))


def _predictors(
    given: str | os.PathLike[str] | None, decoder: Decoder, tensors: dict[str, SourceTensor]
) -> TrainedPredictors | None:
    """Never from the folder by themselves, as exits are: they change what the model says."""
    if given is None:
        return None
    model = fingerprint(tensors[decoder.source_name("output_norm")])
    return open_predictors(Path(given), decoder.spec, model)


def _decoder(folder: Path, tensors: dict[str, SourceTensor]) -> tuple[Decoder, dict[str, SourceTensor]]:
    """The decoder of a folder, and its tensors, each of ours by itself."""
    config, block = without_blocks(config_in(folder, "config.json"))
    decoder = describe(config, config_in(folder, "generation_config.json"))
    tensors = decoder.split(with_scales(tensors, block) if block else tensors)
    output = tensors.get(decoder.source_name("output"))
    embedding = tensors.get(decoder.source_name("token_embedding"))
    if decoder.spec.tied_embeddings and output and embedding and not output.same_bytes(embedding):
        # As transformers 5 does: two different matrices in the file outweigh the config's word.
        decoder = replace(decoder, spec=replace(decoder.spec, tied_embeddings=False))
    return decoder, tensors


def _check_tensors(decoder: Decoder, tensors: dict[str, SourceTensor], folder: Path) -> None:
    """Every tensor of the spec is there, in its shape and a type we read, and no other is."""
    spec = decoder.spec
    strangers = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    if spec.tied_embeddings:
        strangers.discard(decoder.source_name("output"))  # a copy of the embedding
    for decl in iter_declared(spec):
        if decl.name in decoder.computed:
            continue
        parts: list[tuple[str, tuple[int, ...]]] = [(part, (n, k)) for part, n, k in matrices_in(decl)]
        for part, shape in parts or [(decl.name, decl.shape)]:
            name = decoder.source_name(part)
            _check_tensor(shape, name, tensors.get(name), folder)
            strangers.discard(name)
    if strangers:
        raise UnsupportedError(
            f"{folder}: found {len(strangers)} tensors that {spec.architecture} does not have, first "
            f"{shown(min(strangers))}, expected none; convert a model without adapters or extra heads"
        )


def _check_tensor(shape: tuple[int, ...], name: str, found: SourceTensor | None, folder: Path) -> None:
    if found is None:
        raise ConversionError(
            f"{folder}: found no tensor {name}, expected one of shape {list(shape)}; "
            "download the model's files again"
        )
    if not found.readable:
        raise UnsupportedError(
            f"{found.path}: found {name} as {shown(found.dtype)}, expected {', '.join(ITEM_BYTES)}; "
            "convert the model that was not quantised"
        )
    if found.shape != shape:
        raise ConversionError(
            f"{found.path}: found {name} of shape {list(found.shape)}, expected {list(shape)} from "
            "config.json; download the model's files again"
        )


def config_in(folder: Path, name: str) -> HfConfig:
    """The object in a JSON file of the folder; an empty one for a file that is not there."""
    path = folder / name
    return HfConfig(read_object(path) if path.is_file() else {}, str(path))


def tokenizer_json_in(folder: Path) -> bytes:
    """The tokenizer.json of a folder, or one made of its tokenizer.model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / MODEL).is_file():
            config, added = (
                config_in(folder, name) for name in ("tokenizer_config.json", "added_tokens.json")
            )
            return tokenizer_of(folder / MODEL, config, added)
        raise ConversionError(
            f"{folder}: found no tokenizer.json, expected one; download it, or write it with "
            "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    data = read_bytes(path)
    parse_object(data, path)  # a truncated download is cheap to find now and puzzling later
    return data


def metadata_of(folder: Path) -> dict[str, str]:
    """Where the file came from, and what chat needs beside the tokenizer."""
    config = config_in(folder, "tokenizer_config.json")
    metadata = provenance(folder)
    template = _chat_template(folder, config)
    if template is not None:
        metadata["chat_template"] = template
    for key in ("bos_token", "eos_token"):
        text = _token_text(config.values.get(key))
        if text is not None:
            metadata[key] = text
    return metadata


def _chat_template(folder: Path, config: HfConfig) -> str | None:
    """chat_template.jinja before tokenizer_config.json, as in transformers; "default" of a list."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(
                f"{path}: found bytes that are not UTF-8 ({error.reason}); download it again"
            ) from None
    value: Any = config.values.get("chat_template")
    if isinstance(value, list):
        named = [item for item in value if isinstance(item, dict) and item.get("name") == "default"]
        value = named[0].get("template") if named else None
    return value if isinstance(value, str) else None


def _token_text(value: Any) -> str | None:
    """A special token of tokenizer_config.json: text, or an object with its text as content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
