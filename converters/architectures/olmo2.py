"""OLMo 2 (transformers' modeling_olmo2.py): norms behind each part, and over all heads of q and of k."""

from typing import Final

from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import refuse_windows
from edgert.converters.hf_config import HfConfig

NAMES: Final = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}


def variant(config: HfConfig) -> Variant:
    """What an olmo2 config says beyond the fields of the family."""
    refuse_windows(config)
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        joint_qk_norm=True,
        fields={"block": "post"},
        layout=Layout(names=NAMES),
    )
