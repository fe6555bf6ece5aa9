"""Qwen 3, dense (transformers' modeling_qwen3.py): norms on q and k, windows by layer."""

from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_windows
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a qwen3 config says beyond the fields of the family."""
    config.refuse_unless("mlp_bias", False)
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        head_dim=128,  # not width / heads: the default of Qwen3Config
        windows=layer_windows(config),
    )
