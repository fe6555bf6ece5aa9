"""Qwen 2 and 2.5 (transformers' modeling_qwen2.py): biases on q, k and v, windows by layer."""

from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_windows
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a qwen2 config says beyond the fields of the family."""
    config.refuse_unless("attention_bias", True)  # q, k and v always have one
    config.refuse_unless("mlp_bias", False)
    return Variant(qkv_bias=True, windows=layer_windows(config))
