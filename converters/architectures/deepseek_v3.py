"""DeepSeek-V3, R1, Moonlight and Kimi K2 (transformers' modeling_deepseek_v3.py): V2 with sigmoid scores.

What guesses further tokens (`num_nextn_predict_layers`) is left out, as transformers leaves it.
"""

from edgert.converters.architectures import latents
from edgert.converters.architectures.family import Variant
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a deepseek_v3 config says beyond the fields of the family."""
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("scoring_func", "sigmoid")
    config.refuse_unless("topk_method", "noaux_tc")
    return Variant(
        output_bias=config.flag("attention_bias"),
        experts=latents.experts(config, normalized=config.flag("norm_topk_prob", True)),
        latents=latents.latents(config),
        fields={
            "open_shared": True,
            "sigmoid_routing": True,
            "routing_groups": config.integer("n_group"),
            "active_groups": config.integer("topk_group"),
        },
        factors=latents.factors(config),
        layout=latents.layout(config, neighbours=config.flag("rope_interleave", True)),
    )
