"""From the formats models are published in to one .ert file. Converters never import the engine."""

from edgert.converters.dispatch import convert
from edgert.converters.hf import describe_folder
from edgert.converters.pipeline import Calibration
from edgert.converters.report import ConversionReport, Progress, TensorReport
from edgert.converters.split import split

__all__ = [
    "Calibration",
    "ConversionReport",
    "Progress",
    "TensorReport",
    "convert",
    "describe_folder",
    "split",
]
