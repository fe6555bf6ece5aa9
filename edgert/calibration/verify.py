"""A converted model beside its source, run by the source's own runtime."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert import converters, runtime
from edgert.converters.dispatch import onnx_model
from edgert.converters.onnx.reference import onnx_logits
from edgert.converters.report import ConversionReport
from edgert.errors import OptionError

SAMPLE: Final = (
    "Once upon a time, there was a little boy named Tim who lived near a river. One day the water rose, "
    "and he asked: what should we do? In 1984, 3 of 10 bridges fell; x = (a + b) / 2 was the rule then."
)
MOST_TOKENS: Final = 96
# Tolerances in the spread (standard deviation) of the source's logits, several times what exports of good
# models were found to differ by. Floats stored without loss differ by the cache, which holds 16 bits: by a
# thousandth or few. 4-bit exports ask onnxruntime to round activations to 8 bits, which alone moves a logit
# by up to a tenth. A wrong mask, turn or norm moves logits by the spread itself.
EXACT_SHARE: Final = 0.02
BLOCKS_SHARE: Final = 0.25
# The relative error of a matrix that counts as stored without loss: scales rounded to 16 bits.
LOSSLESS: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the converted model's logits are from the source's."""

    positions: int
    worst: float  # the largest difference of two logits
    spread: float  # the standard deviation of the source's logits
    tolerance: float
    same_choice: int  # positions whose largest logit is the same token's
    worst_rounded: float | None = (
        None  # the largest difference of the file's own logits, if it lost something
    )

    @property
    def passed(self) -> bool:
        """Whether no logit differs by more than the tolerance."""
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        text = (
            f"logits differ from onnxruntime's by at most {self.worst:.3g} over {self.positions} positions, "
            f"tolerance {self.tolerance:.3g} (the logits' spread is {self.spread:.3g}); "
            f"{self.same_choice} of {self.positions} choose the same token"
        )
        if self.worst_rounded is None:
            return text
        return f"before rounding, {text}; with it they differ by {self.worst_rounded:.3g}"


def check_source(source: Path) -> Path:
    """The ONNX file of a source that can be compared; OptionError for any other."""
    found = onnx_model(source) if source.exists() else None
    if found is None:
        raise OptionError(f"--verify runs ONNX models; {source} is none, convert it without --verify")
    return found


def verify_conversion(source: Path, report: ConversionReport) -> Verification:
    """Run a sample text through both. Raises what `onnx_logits`, `edgert.convert` and `edgert.load` raise.

    No tolerance tells rounded weights from a graph that was misread. So a file that lost something is
    converted once more in the types of its source, beside it for a while, and that is what must agree.
    """
    model = check_source(source)
    with runtime.load(report.path, threads=1) as loaded:
        tokens = loaded.tokenizer.encode(SAMPLE)[: min(MOST_TOKENS, loaded.spec.context)]
    theirs, rounded = onnx_logits(model, tokens), None
    if max(tensor.relative_error for tensor in report.tensors) > LOSSLESS:
        rounded = float(np.abs(_logits(report.path, tokens) - theirs).max())
        path = report.path.with_name(f".{report.path.name[:40]}.{secrets.token_hex(4)}.verify")
        try:
            ours = _logits(converters.convert(model, path, sparsity="none").path, tokens)
        finally:
            path.unlink(missing_ok=True)
    else:
        ours = _logits(report.path, tokens)
    share = BLOCKS_SHARE if any("int" in tensor.source_type for tensor in report.tensors) else EXACT_SHARE
    spread = float(theirs.std())
    return Verification(
        positions=len(tokens),
        worst=float(np.abs(ours - theirs).max()),
        spread=spread,
        tolerance=spread * share,
        same_choice=int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum()),
        worst_rounded=rounded,
    )


def _logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    with runtime.load(path, threads=1) as model:
        return model.logits(tokens)
