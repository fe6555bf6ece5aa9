"""`edgert.convert`: a conversion, after a look at the model at work where a text is given for it."""

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert import converters
from edgert.calibration.firing import Firings
from edgert.calibration.inputs import WAYS, write_with_inputs
from edgert.calibration.sensitivity import Sensitivity
from edgert.calibration.statistics import ExpertUses, Floats, Grams
from edgert.calibration.text import DEFAULT_TOKENS, Text, read_text
from edgert.calibration.walk import Walk
from edgert.config import Quant, QuantSpec
from edgert.converters import ConversionReport, Progress
from edgert.converters.budget import Choice, assign
from edgert.converters.hottest_first import Firing
from edgert.converters.hub import local
from edgert.converters.neurons import Sparsity, check_text, share_of
from edgert.errors import ConversionError, OptionError
from edgert.format import ErtFile
from edgert.format.layout import allowed_quants, stored_bytes
from edgert.model.forward import Forward
from edgert.planner import plan
from edgert.state import Weights
from edgert.tokenizer import Tokenizer

WINDOW = 2048
"""Tokens of a window, at most: what the calibrated methods were published with."""


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: Quant | QuantSpec | None = None,
    progress: Progress | None = None,
    *,
    exits: str | os.PathLike[str] | None = None,
    predictor: str | os.PathLike[str] | None = None,
    sparsity: Sparsity = "auto",
    calibrate: str | os.PathLike[str] | None = None,
    bits: float | None = None,
    embedding: Quant | None = None,
    outliers: int = 0,
    dry_run: bool = False,
) -> ConversionReport:
    """As `edgert.converters.convert`; with `calibrate`, a .txt or .jsonl file, rounded as suits that text.

    The model is first written beside `out` in 8 bits (a GGUF file in the types it has) and run over the
    text; then every matrix is rounded so that its products with what it met there change least. The file
    says what it was calibrated with. `bits` in place of `quant`: stored bits per weight of the whole file, at
    most; each tensor, each expert takes the type that its measured share in the loss is worth
    (sensitivity.py), but the token embedding that of `embedding`, where that is given. dry_run: write no
    model; the report says what it would be. Raises what `converters.convert` raises, and UsageError for
    the text.
    """
    inputs = share_of(sparsity, WAYS)
    if inputs is not None:
        if calibrate is None:
            raise OptionError(
                f"sparsity is {sparsity}, which needs a text to find its thresholds; give calibrate"
            )
        with _beside(Path(out), "whole") as whole:
            report = convert(
                source,
                whole,
                quant,
                progress,
                exits=exits,
                predictor=predictor,
                sparsity="none",
                calibrate=calibrate,
                bits=bits,
                embedding=embedding,
                dry_run=dry_run,
            )
            if not dry_run:
                write_with_inputs(whole, Path(out), Path(calibrate), *inputs)
                report = replace(report, file_bytes=Path(out).stat().st_size)
        return replace(report, path=Path(out))
    if bits is not None and quant is not None:
        raise OptionError(f"quant is {quant} and bits {bits}; both say how matrices are stored, give one")
    if bits is not None and predictor is not None:
        raise OptionError(f"predictor is {predictor} and bits {bits}; neurons one by one have one type")
    if bits is not None and outliers:
        raise OptionError(
            f"outliers is {outliers} and bits {bits}, whose measure does not know of them; give one"
        )
    if outliers and calibrate is None:
        raise OptionError(f"outliers is {outliers}, which needs a text to find them; give calibrate")
    if bits is None and embedding is not None:
        raise OptionError(f"embedding is {embedding} without bits; expected quant=QuantSpec(...)")
    check_text(sparsity, calibrate is not None)
    if bits is None and (calibrate is None or dry_run):
        return converters.convert(
            source,
            out,
            quant,
            progress,
            exits=exits,
            predictor=predictor,
            sparsity=sparsity,
            outliers=outliers,
            dry_run=dry_run,
        )
    with local(source, progress=progress) as path:
        if bits is not None:
            return _within(path, Path(out), bits, embedding, progress, exits, sparsity, calibrate, dry_run)
        assert calibrate is not None
        with (
            _reference(path, Path(out), exits) as file,
            closing(TextCalibration(file, Path(calibrate), zeros=_share(sparsity))) as c,
        ):
            return converters.convert(
                path,
                out,
                quant,
                progress,
                exits=exits,
                predictor=predictor,
                sparsity=sparsity,
                outliers=outliers,
                calibration=c,
            )


def _within(
    source: Path,
    out: Path,
    bits: float,
    embedding: Quant | None,
    progress: Progress | None,
    exits: str | os.PathLike[str] | None,
    sparsity: Sparsity,
    calibrate: str | os.PathLike[str] | None,
    dry_run: bool,
) -> ConversionReport:
    """A conversion under a budget of bits per weight."""
    if calibrate is None:
        raise OptionError(f"bits is {bits}; expected a text to measure on as well: calibrate")
    if not 0 < bits < 32:
        raise OptionError(f"bits is {bits}; expected a number above 0 and below 32, like 4.25")
    if sparsity not in ("auto", "none"):
        raise OptionError(
            f"sparsity is {sparsity} and bits {bits}; neurons one by one have one type, give one"
        )
    with (
        _reference(source, out, exits, "q8") as file,
        closing(TextCalibration(file, Path(calibrate))) as c,
    ):
        with closing(Sensitivity(file, c.config, c.text.windows)) as measured:
            each = assignment(file, measured.losses(c, progress), bits, embedding)
        c.restart()
        return converters.convert(
            source,
            out,
            QuantSpec(each=each),
            progress,
            exits=exits,
            sparsity="none",
            calibration=None if dry_run else c,
            dry_run=dry_run,
        )


def assignment(
    file: ErtFile, losses: Mapping[str, Mapping[Quant, float]], bits: float, embedding: Quant | None = None
) -> dict[str, Quant]:
    """The type of every tensor of a model so that it takes at most `bits` per weight.

    losses: of `Sensitivity`. embedding: the type of the token embedding, where that is given. Raises
    OptionError for too few bits.
    """
    tensors = [t for t in file.tensors.values() if t.role != "bytes"]
    budget = bits / 8 * sum(math.prod(t.shape) for t in tensors if t.name != "rope_frequencies")
    fixed: dict[str, Quant] = {"token_embedding": embedding} if embedding else {}
    choices = {}
    for tensor in tensors:
        if tensor.name in fixed:
            budget -= stored_bytes(tensor.role, fixed[tensor.name], tensor.shape)
        elif tensor.name in losses:
            allowed = allowed_quants(tensor.role, tensor.shape)
            choices[tensor.name] = [
                Choice(quant, stored_bytes(tensor.role, quant, tensor.shape), loss)
                for quant, loss in losses[tensor.name].items()
                if quant in allowed
            ]
        else:
            budget -= tensor.nbytes
    return assign(choices, budget) | fixed


@contextmanager
def _reference(
    source: Path, out: Path, exits: str | os.PathLike[str] | None, quant: Quant | None = None
) -> Iterator[ErtFile]:
    """The model near enough to the source's precision to be observed, in a temporary file beside `out`."""
    with _beside(out, "reference") as temporary:
        converters.convert(
            source, temporary, quant or ("q8" if source.is_dir() else None), exits=exits, sparsity="none"
        )
        with ErtFile.open(temporary) as file:
            yield file


@contextmanager
def _beside(out: Path, kind: str) -> Iterator[Path]:
    """A name for a temporary file beside `out`, which is gone afterwards."""
    temporary = out.with_name(f".{out.name[:40]}.{secrets.token_hex(4)}.{kind}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _share(sparsity: Sparsity) -> float:
    return float(sparsity) if isinstance(sparsity, int | float) else 0.0


class TextCalibration:
    """What a model's matrices meet in a text: a `converters.Calibration`. Close it after use.

    It goes through the model as it is asked, one layer at a time, and holds the statistics of one layer.
    """

    def __init__(self, file: ErtFile, path: Path, tokens: int = DEFAULT_TOKENS, zeros: float = 0.0) -> None:
        json_bytes = file.tokenizer_json()
        if json_bytes is None:
            raise ConversionError(
                f"{path} cannot calibrate a model without a tokenizer; expected one in the source"
            )
        self._spec = spec = file.spec
        self.config = plan(spec, file.size, context=min(spec.context, WINDOW))
        self.text: Text = read_text(path, Tokenizer(json_bytes), self.config.context, tokens)
        weights = Weights.of_file(file)
        self._forward = Forward(weights, self.config)
        self._walk = Walk(self._forward, weights, self.text.windows)
        self._grams, self._firings = Grams(), Firings(spec.activation)
        self._firing: dict[int, Firing] = {}
        self._uses = ExpertUses(spec.layers, spec.experts)
        self.zeros_wanted = zeros
        self._at = -1  # the layer whose statistics are held; `layers` for the output

    def restart(self) -> None:
        """Begin again, before the first layer."""
        self._walk.reached, self._at = self._spec.first_layer, -1
        self._uses.counts[:] = 0

    def rows(self, name: str) -> int:
        """How many rows a matrix met that `gram` was just asked for."""
        return self._grams.rows(name)

    def close(self) -> None:
        """End the threads."""
        self._forward.close()

    @property
    def metadata(self) -> dict[str, str]:
        """What the file records of the text."""
        return self.text.metadata()

    def gram(self, name: str) -> Floats | None:
        """The mean of x x^T over the rows x that a matrix met, float32 [K, K]; None where it met none.

        Matrices are asked for in the order of layers, the output matrix last.
        """
        kind, *rest = name.split(".")
        own = "token_embedding" if self._spec.tied_embeddings else "output"
        if kind != "layers" and name != own:
            return None  # looked up, not multiplied; or of an exit
        self._go_to(int(rest[0]) if kind == "layers" else self._spec.layers)
        if "experts" in rest and rest[-1] in ("gate", "up"):
            name = f"layers.{rest[0]}.router"
        return self._grams.mean(name)

    def firing(self, layer: int) -> Firing | None:
        """How often the neurons of a layer fire, and where the threshold lies; None for experts."""
        if layer not in self._firing:
            self._go_to(layer)
        return self._firing.get(layer)

    def expert_uses(self) -> NDArray[np.int64]:
        """How many tokens chose each expert, [L, E]. To be asked for when everything else was."""
        self._go_to(self._spec.layers - 1)
        return self._uses.counts

    def _go_to(self, layer: int) -> None:
        while self._at < layer:
            self._grams.clear()
            self._at += 1
            if self._at < self._spec.layers:
                self._firings.clear()
                self._walk.layer([self._grams, self._firings, self._uses])
                found = self._firings.result(self.zeros_wanted)
                if found is not None:
                    self._firing[self._at] = found
            else:
                self._walk.output([self._grams])
