"""GLM 4 (transformers' modeling_glm4.py): norms around each part; half of a head rotated, in neighbours."""

from typing import Final

from edgert.converters.architectures.cuts import Layout, Stacked
from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import refuse_windows
from edgert.converters.hf_config import HfConfig

NAMES: Final = {
    "attention_post_norm": "post_self_attn_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_post_norm": "post_mlp_layernorm.weight",
}


def variant(config: HfConfig) -> Variant:
    """What a glm4 config says beyond the fields of the family."""
    refuse_windows(config)
    inner = config.integer("intermediate_size")
    return Variant(
        qkv_bias=config.flag("attention_bias", True),
        head_dim=128,
        fields={"block": "around"},
        layout=Layout(
            names=NAMES,
            cuts={"mlp.gate_up_proj.weight": Stacked({"gate": inner, "up": inner})},
            interleaved=True,
        ),
        partial_rotary=0.5,
    )
