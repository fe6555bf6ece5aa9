"""Ministral (transformers' modeling_ministral.py): Mistral with windows in some layers."""

from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_count, typed_windows, window_size
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a ministral config says beyond the fields of the family."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("mlp_bias", False)
    size = window_size(config)
    usual = ["sliding_attention" if size else "full_attention"] * layer_count(config)
    return Variant(windows=typed_windows(config, config.texts("layer_types") or usual, size))
