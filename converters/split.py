"""From one model to the two files of a hand-off: the lower layers for the edge, the rest for the cloud."""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgert.config import ModelSpec, Quant, QuantSpec
from edgert.converters.dispatch import convert
from edgert.converters.neurons import Sparsity
from edgert.converters.report import ConversionReport, Progress, TensorReport
from edgert.errors import OptionError
from edgert.format import ErtFile, ErtWriter
from edgert.format.identity import MODEL_KEY, identity
from edgert.format.layout import QUANTIZED
from edgert.format.rewrite import copy_tensors
from edgert.format.tensors import TOKENIZER, declared
from edgert.resident import peak_rss_bytes


def split(
    source: str | os.PathLike[str],
    layer: int,
    edge: str | os.PathLike[str],
    cloud: str | os.PathLike[str],
    quant: Quant | QuantSpec | None = None,
    progress: Progress | None = None,
    *,
    exits: str | os.PathLike[str] | None = None,
    sparsity: Sparsity = "auto",
) -> tuple[ConversionReport, ConversionReport]:
    """Write the layers before `layer`, with the exits among them, to `edge` and the rest to `cloud`.

    `source` is anything `convert` reads, or an .ert file, whose stored bytes are then copied as they are
    (`quant` and `exits` do not apply). Both halves bear the identity of the whole model, so that a cloud
    can refuse an edge that was cut from another. Raises OptionError for a layer that leaves a half empty
    or a model that is a half already, ChecksumError for a damaged .ert file, and what `convert` raises.
    """
    edge, cloud = Path(edge), Path(cloud)
    if edge == cloud:
        raise OptionError(f"both halves would be written to {edge}; expected two names: edge.ert,cloud.ert")
    with _whole(source, edge, quant, progress, exits, sparsity) as file:
        spec = file.spec
        if spec.part:
            raise OptionError(f"{file.path}: found half a model already; split the whole one")
        if not 0 < layer < spec.layers:
            raise OptionError(f"split is {layer}; expected 1 to {spec.layers - 1} of {spec.layers} layers")
        return (
            _write_half(file, edge, (0, layer)),
            _write_half(file, cloud, (layer, spec.layers)),
        )


@contextmanager
def _whole(
    source: str | os.PathLike[str],
    edge: Path,
    quant: Quant | QuantSpec | None,
    progress: Progress | None,
    exits: str | os.PathLike[str] | None,
    sparsity: Sparsity,
) -> Iterator[ErtFile]:
    """The source as an .ert file, converted to a temporary one beside `edge` if it is not one."""
    if Path(source).suffix == ".ert":
        with ErtFile.open(Path(source)) as file:
            yield file
        return
    temporary = edge.with_name(f".{edge.name[:40]}.{secrets.token_hex(4)}.whole")
    try:
        convert(source, temporary, quant, progress, exits=exits, sparsity=sparsity)
        with ErtFile.open(temporary) as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def _write_half(file: ErtFile, out: Path, part: tuple[int, int]) -> ConversionReport:
    started = time.monotonic()
    spec = half_spec(file.spec, part)
    is_edge = part[0] == 0
    tokenizer = file.tokenizer_json() if is_edge else None  # the cloud half sees no text
    names = [decl.name for decl in declared(spec)]
    quants = {name: file.tensors[name].quant for name in names if file.tensors[name].role in QUANTIZED}
    metadata = _half_metadata(file, names, is_edge)
    with ErtWriter(out, spec, quants, tokenizer, metadata) as writer:
        copy_tensors(file, writer, names)
        writer.finish()
    errors = json.loads(metadata.get("errors", "{}"))
    reports = tuple(
        TensorReport(t.name, t.shape, t.quant, t.quant, t.nbytes, errors.get(t.name, 0.0))  # type: ignore[arg-type]
        for t in writer.tensors.values()
        if t.name != TOKENIZER
    )
    return ConversionReport(out, spec, reports, writer.size, time.monotonic() - started, peak_rss_bytes())


def half_spec(spec: ModelSpec, part: tuple[int, int]) -> ModelSpec:
    """The spec of a file that holds the layers [first, last) of a model."""
    return replace(spec, part=part)


def _half_metadata(file: ErtFile, names: list[str], is_edge: bool) -> dict[str, str]:
    """The whole file's, with the identity of the model and without what only the other half needs."""
    metadata = dict(file.metadata) | {MODEL_KEY: identity(file)}
    if not is_edge:
        metadata.pop("chat_template", None)
    if "errors" in metadata:
        errors = json.loads(metadata["errors"])
        own = {name: errors[name] for name in names if name in errors}
        metadata["errors"] = json.dumps(own, separators=(",", ":"))
    return metadata
