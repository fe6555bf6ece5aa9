"""Looking at a model at work, so that its conversion loses less."""

from edgert.calibration.convert import TextCalibration, convert
from edgert.calibration.cost import sparsity_cost
from edgert.calibration.walk import Observer, Walk

__all__ = ["Observer", "TextCalibration", "Walk", "convert", "sparsity_cost"]
