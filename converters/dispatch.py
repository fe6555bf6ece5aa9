"""From a path to the converter that reads it."""

import os
from pathlib import Path
from typing import Final

from edgert.config import Quant, QuantSpec
from edgert.converters.gguf.convert import convert_gguf
from edgert.converters.gguf.reader import MAGIC
from edgert.converters.hf import convert_hf
from edgert.converters.hub import local
from edgert.converters.neurons import Sparsity
from edgert.converters.onnx.beside import model_in
from edgert.converters.onnx.convert import convert_onnx
from edgert.converters.pipeline import Calibration
from edgert.converters.report import ConversionReport, Progress
from edgert.errors import ConversionError, NotAModelError, OptionError

SUPPORTED: Final = (
    "a Hugging Face folder (config.json, *.safetensors, tokenizer.json), a GGUF file, an ONNX model, or a "
    "model's name on the Hub: hf://org/name"
)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: Quant | QuantSpec | None = None,
    progress: Progress | None = None,
    *,
    exits: str | os.PathLike[str] | None = None,
    predictor: str | os.PathLike[str] | None = None,
    calibration: Calibration | None = None,
    sparsity: Sparsity = "auto",
    outliers: int = 0,
    dry_run: bool = False,
) -> ConversionReport:
    """Convert a model to an .ert file and report size and error of every tensor.

    `source` is a Hugging Face folder, a GGUF file or one of its parts, an ONNX model or the folder of one, or
    a name on the Hugging Face Hub (hub.py); `quant` is one name for all matrices ("f32", "f16", "q8", "q4")
    or a QuantSpec, by default q4 for a Hugging Face folder and else what the source has (q8 where ours has no
    like); `progress` is called after every slab; `exits` is a file of `edgert train exits` for a folder (by
    default its own exits.safetensors, if it has one), `predictor` one of `edgert train predictor`, which
    skips gates and is not exact; `calibration` is what its matrices meet at work, for less loss.
    `sparsity` "exact" stores up and down neuron by neuron, so that neurons that do not fire are not read;
    "auto" does that where the activation is zero for many (ReLU and its like) and the model at least 512
    wide, "none" never; a number from 0 to 0.9 takes this share of the smallest activations for zero, which is
    not exact and needs a `calibration`. `outliers`, a multiple of 32, stores so many columns of every matrix
    of a folder's layers apart, in 8 bits: those whose inputs are largest (outliers.py; needs one too). An
    existing `out` is replaced when the conversion is complete; a conversion that fails leaves it as it was.
    Raises NotAModelError, UnsupportedError, ConversionError or OptionError, each in one line.
    """
    with local(source, dry_run, progress) as path:
        return _convert_local(
            path, Path(out), quant, progress, exits, predictor, calibration, sparsity, outliers, dry_run
        )


def _convert_local(
    source: Path,
    out: Path,
    quant: Quant | QuantSpec | None,
    progress: Progress | None,
    exits: str | os.PathLike[str] | None,
    predictor: str | os.PathLike[str] | None,
    calibration: Calibration | None,
    sparsity: Sparsity,
    outliers: int,
    dry_run: bool,
) -> ConversionReport:
    """Convert what lies on this disk."""
    if not os.path.lexists(source):
        raise NotAModelError(f"{source}: found no such file or folder, expected {SUPPORTED}; check the path")
    is_gguf = source.is_file() and _is_gguf(source)
    onnx = None if is_gguf else onnx_model(source)
    if not source.is_dir() and not is_gguf and onnx is None:
        raise _not_a_model(source)
    if not out.parent.is_dir():
        raise ConversionError(f"{out}: found no folder {out.parent} to write to; make it first")
    if is_gguf or onnx is not None:
        kind = "a GGUF file" if is_gguf else "an ONNX model"
        for name, given in (("exits", exits), ("predictor", predictor)):
            if given is not None:
                raise OptionError(f"{name} is {given}; expected none for {kind}, convert the model's folder")
        if sparsity not in ("auto", "none"):
            raise OptionError(f"sparsity is {sparsity}; expected none for {kind}, convert the model's folder")
        if outliers:
            raise OptionError(f"outliers is {outliers}; expected none for {kind}, convert the model's folder")
    if is_gguf:
        return convert_gguf(source, out, quant, progress=progress, calibration=calibration, dry_run=dry_run)
    if onnx is not None:
        return convert_onnx(onnx, out, quant, progress=progress, calibration=calibration, dry_run=dry_run)
    return convert_hf(
        source,
        out,
        quant or "q4",
        exits=exits,
        predictor=predictor,
        sparsity=sparsity,
        outliers=outliers,
        progress=progress,
        calibration=calibration,
        dry_run=dry_run,
    )


def onnx_model(source: Path) -> Path | None:
    """The ONNX file of a source: itself, or the one of a folder without safetensors; None if it has none."""
    if source.is_dir():
        return None if any(source.glob("*.safetensors*")) else model_in(source)
    return source if source.suffix.lower() == ".onnx" else None


def _is_gguf(source: Path) -> bool:
    """By name, or by its first bytes: Ollama stores models under their checksums."""
    try:
        with source.open("rb") as file:
            return source.suffix.lower() == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ConversionError(
            f"{source}: cannot be read ({error.strerror}); check the file and its rights"
        ) from None


def _not_a_model(source: Path) -> Exception:
    if source.suffix.lower() in (".safetensors", ".json"):
        return NotAModelError(
            f"{source}: found one file of a model, expected {SUPPORTED}; pass the folder that holds it"
        )
    return NotAModelError(f"{source}: found a file, expected {SUPPORTED}; check the path")
