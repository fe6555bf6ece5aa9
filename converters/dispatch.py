"""From a path to the converter that reads it."""

import os
from pathlib import Path
from typing import Final

from edgert.config import Quant, QuantSpec
from edgert.converters.hf import convert_hf
from edgert.converters.report import ConversionReport, Progress
from edgert.errors import ConversionError, NotAModelError, UnsupportedError

SUPPORTED: Final = "a Hugging Face folder (config.json, *.safetensors, tokenizer.json)"


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: Quant | QuantSpec = "q4",
    progress: Progress | None = None,
    *,
    exits: str | os.PathLike[str] | None = None,
) -> ConversionReport:
    """Convert a model to an .ert file and report size and error of every tensor.

    `source` is a Hugging Face folder; `quant` is one name for all matrices ("f32", "f16", "q8",
    "q4") or a QuantSpec; `progress` is called after every slab; `exits` is a file of `edgert train exits`
    (by default the folder's own exits.safetensors, if it has one). An existing `out` is replaced
    when the conversion is complete; a conversion that fails leaves it as it was.
    Raises NotAModelError, UnsupportedError, ConversionError or OptionError, each in one line.
    """
    source, out = Path(source), Path(out)
    if not os.path.lexists(source):
        raise NotAModelError(f"{source}: found no such file or folder, expected {SUPPORTED}; check the path")
    if not source.is_dir():
        raise _not_a_folder(source)
    if not out.parent.is_dir():
        raise ConversionError(f"{out}: found no folder {out.parent} to write to; make it first")
    return convert_hf(source, out, quant, exits=exits, progress=progress)


def _not_a_folder(source: Path) -> Exception:
    kinds = {".gguf": "a GGUF file", ".onnx": "an ONNX model"}
    if source.suffix.lower() in kinds:
        return UnsupportedError(
            f"{source}: found {kinds[source.suffix.lower()]}, which edgert does not convert yet, "
            f"expected {SUPPORTED}; convert the model it was made from"
        )
    if source.suffix.lower() in (".safetensors", ".json"):
        return NotAModelError(
            f"{source}: found one file of a model, expected {SUPPORTED}; pass the folder that holds it"
        )
    return NotAModelError(f"{source}: found a file, expected {SUPPORTED}; check the path")
