"""OLMo 3 (transformers' modeling_olmo3.py): OLMo 2 with windows, and rope stretched in the other layers."""

from edgert.config import GLOBAL_ROPE, LOCAL_ROPE
from edgert.converters.architectures import olmo2
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant, rope_of_kind
from edgert.converters.architectures.windows import layer_kinds, typed_windows, window_size
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What an olmo3 config says beyond the fields of the family."""
    bias, kinds = config.flag("attention_bias"), layer_kinds(config, 4)
    ropes = tuple(LOCAL_ROPE if kind == "sliding_attention" else GLOBAL_ROPE for kind in kinds)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        joint_qk_norm=True,
        windows=typed_windows(config, kinds, window_size(config)),
        fields={"block": "post", "ropes": ropes if LOCAL_ROPE in ropes else ()},
        layout=Layout(names=olmo2.NAMES),
        rope=rope_of_kind(config, "full_attention", "rope_theta", 500000.0),
        local_rope=rope_of_kind(config, "sliding_attention", "rope_theta", 500000.0),
    )
