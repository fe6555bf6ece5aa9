"""`edgert.convert`: a conversion, after a look at the model at work where a text is given for it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from edgert import converters
from edgert.calibration.firing import Firings
from edgert.calibration.statistics import Floats, Grams
from edgert.calibration.text import DEFAULT_TOKENS, Text, read_text
from edgert.calibration.walk import Walk
from edgert.config import Quant, QuantSpec
from edgert.converters import ConversionReport, Progress
from edgert.converters.hottest_first import Firing
from edgert.converters.neurons import Sparsity
from edgert.errors import ConversionError
from edgert.format import ErtFile
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
    sparsity: Sparsity = "auto",
    calibrate: str | os.PathLike[str] | None = None,
) -> ConversionReport:
    """As `edgert.converters.convert`; with `calibrate`, a .txt or .jsonl file, rounded as suits that text.

    The model is first written beside `out` in 8 bits (a GGUF file in the types it has) and run over the
    text; then every matrix is rounded so that its products with what it met there change least. The file
    says what it was calibrated with. Raises what `converters.convert` raises, and UsageError for the text.
    """
    if calibrate is None:  # a share of zeros is refused there
        return converters.convert(source, out, quant, progress, exits=exits, sparsity=sparsity)
    with (
        _reference(Path(source), Path(out), exits) as file,
        closing(TextCalibration(file, Path(calibrate), zeros=_share(sparsity))) as c,
    ):
        return converters.convert(source, out, quant, progress, exits=exits, sparsity=sparsity, calibration=c)


@contextmanager
def _reference(source: Path, out: Path, exits: str | os.PathLike[str] | None) -> Iterator[ErtFile]:
    """The model near enough to the source's precision to be observed, in a temporary file beside `out`."""
    temporary = out.with_name(f".{out.name[:40]}.{secrets.token_hex(4)}.reference")
    try:
        converters.convert(source, temporary, "q8" if source.is_dir() else None, exits=exits, sparsity="none")
        with ErtFile.open(temporary) as file:
            yield file
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
        config = plan(spec, file.size, context=min(spec.context, WINDOW))
        self.text: Text = read_text(path, Tokenizer(json_bytes), config.context, tokens)
        weights = Weights.of_file(file)
        self._forward = Forward(weights, config)
        self._walk = Walk(self._forward, weights, self.text.windows)
        self._grams, self._firings = Grams(), Firings(spec.activation)
        self._firing: dict[int, Firing] = {}
        self.zeros_wanted = zeros
        self._at = -1  # the layer whose statistics are held; `layers` for the output

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

    def _go_to(self, layer: int) -> None:
        while self._at < layer:
            self._grams.clear()
            self._at += 1
            if self._at < self._spec.layers:
                self._firings.clear()
                self._walk.layer([self._grams, self._firings])
                found = self._firings.result(self.zeros_wanted)
                if found is not None:
                    self._firing[self._at] = found
            else:
                self._walk.output([self._grams])
