"""Phi 3 and 4 (transformers' modeling_phi3.py): q, k, v in one matrix, gate and up in another.

Where rope is stretched by LongRoPE, the file's context is that of the short factors (converters/rope.py).
"""

from edgert.converters.architectures.cuts import Layout, Stacked
from edgert.converters.architectures.family import Variant, head_size
from edgert.converters.architectures.windows import every_layer
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a phi3 config says beyond the fields of the family."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("lm_head_bias", False)
    config.refuse_unless("layer_types")
    heads, d = config.integer("num_attention_heads"), head_size(config)
    inner = config.integer("intermediate_size")
    keys = config.integer("num_key_value_heads", heads) * d
    return Variant(
        windows=every_layer(config),
        layout=Layout(
            cuts={
                "self_attn.qkv_proj.weight": Stacked({"q": heads * d, "k": keys, "v": keys}),
                "mlp.gate_up_proj.weight": Stacked({"gate": inner, "up": inner}),
            }
        ),
        partial_rotary=1.0,
    )
