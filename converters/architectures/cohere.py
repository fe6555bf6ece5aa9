"""Command R and Aya (transformers' modeling_cohere.py): parallel blocks of one LayerNorm without bias.

Rotary pairs are neighbours; `logit_scale` is multiplied into the last gain.
"""

from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a cohere config says beyond the fields of the family."""
    config.refuse_unless("sliding_window")
    return parallel(config)


def parallel(config: HfConfig) -> Variant:
    """What Cohere's models have in common."""
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        fields={"block": "parallel", "shared_norm": True, "layer_norm": True},
        keys={"rms_norm_eps": "layer_norm_eps"},
        defaults={"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
        layout=Layout(interleaved=True),
        factors={"output_norm": config.number("logit_scale", 0.0625)},
        understood=frozenset({"logit_scale"}),
    )
