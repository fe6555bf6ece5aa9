"""A converted model beside its source, run by the source's own runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edgert import runtime
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
# by up to a tenth. Rounded weights add their relative error a few times over, the worst of all logits
# several standard deviations of it. A wrong mask, turn or norm moves logits by the spread itself.
EXACT_SHARE: Final = 0.02
BLOCKS_SHARE: Final = 0.25
ROUNDED_FACTOR: Final = 12.0


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the converted model's logits are from the source's."""

    positions: int
    worst: float  # the largest difference of two logits
    spread: float  # the standard deviation of the source's logits
    tolerance: float
    same_choice: int  # positions whose largest logit is the same token's

    @property
    def passed(self) -> bool:
        """Whether no logit differs by more than the tolerance."""
        return self.worst <= self.tolerance

    def __str__(self) -> str:
        return (
            f"logits differ from onnxruntime's by at most {self.worst:.3g} over {self.positions} positions, "
            f"tolerance {self.tolerance:.3g} (the logits' spread is {self.spread:.3g}); "
            f"{self.same_choice} of {self.positions} choose the same token"
        )


def check_source(source: Path) -> Path:
    """The ONNX file of a source that can be compared; OptionError for any other."""
    found = onnx_model(source) if source.exists() else None
    if found is None:
        raise OptionError(f"--verify runs ONNX models; {source} is none, convert it without --verify")
    return found


def verify_conversion(source: Path, report: ConversionReport) -> Verification:
    """Run a sample text through both. Raises what `onnx_logits` and `edgert.load` raise."""
    with runtime.load(report.path, threads=1) as model:
        tokens = model.tokenizer.encode(SAMPLE)[: min(MOST_TOKENS, model.spec.context)]
        ours = model.logits(tokens)
    theirs = onnx_logits(check_source(source), tokens)
    rounded = max(tensor.relative_error for tensor in report.tensors)
    share = BLOCKS_SHARE if any("int" in tensor.source_type for tensor in report.tensors) else EXACT_SHARE
    spread = float(theirs.std())
    return Verification(
        positions=len(tokens),
        worst=float(np.abs(ours - theirs).max()),
        spread=spread,
        tolerance=spread * (share + ROUNDED_FACTOR * rounded),
        same_choice=int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum()),
    )
