"""StableLM (transformers' modeling_stablelm.py): LayerNorm, a part of each head rotated, maybe parallel."""

from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.names import NORM_BIASES
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a stablelm config says beyond the fields of the family."""
    config.refuse_unless("sliding_window")
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("mlp_bias", False)
    parallel = config.flag("use_parallel_residual")
    return Variant(
        qkv_bias=config.flag("use_qkv_bias"),
        fields={
            "block": "parallel" if parallel else "pre",
            "shared_norm": parallel,
            "layer_norm": True,
            "norm_bias": True,
        },
        keys={"rms_norm_eps": "layer_norm_eps"},
        defaults={"rms_norm_eps": 1e-5},
        layout=Layout(names=NORM_BIASES),
        partial_rotary=0.25,
        understood=frozenset({"use_parallel_residual"}),
    )
