"""Llama (transformers' modeling_llama.py): biases on all of attention or on none of it."""

from edgert.converters.architectures.family import Variant
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a llama config says beyond the fields of the family."""
    config.refuse_unless("sliding_window")
    config.refuse_unless("use_sliding_window", False)
    config.refuse_unless("layer_types")
    attention_bias = config.flag("attention_bias")
    return Variant(qkv_bias=attention_bias, output_bias=attention_bias, ffn_bias=config.flag("mlp_bias"))
