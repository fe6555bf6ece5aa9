"""Mistral (transformers' modeling_mistral.py): no biases, one sliding window for every layer."""

from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_count, window_size
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a mistral config says beyond the fields of the family."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("layer_types")  # alternating windows are Ministral's, another model_type
    size = window_size(config)
    if size:  # transformers applies the window whatever this says; a config that denies it is unclear
        config.refuse_unless("use_sliding_window", True)
    return Variant(windows=(size,) * layer_count(config))
