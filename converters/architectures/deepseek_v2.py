"""DeepSeek-V2 (transformers' modeling_deepseek_v2.py): latent attention, experts chosen in groups.

Its code normalises no weights, whatever `norm_topk_prob` says, so a config that asks for it is refused.
"""

from edgert.converters.architectures import latents
from edgert.converters.architectures.family import Variant
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a deepseek_v2 config says beyond the fields of the family."""
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("scoring_func", "softmax")
    config.refuse_unless("topk_method", "greedy", "group_limited_greedy")
    config.refuse_unless("norm_topk_prob", False)
    fields: dict[str, object] = {"open_shared": True}
    if config.text("topk_method", "greedy") == "group_limited_greedy":
        fields |= {
            "routing_groups": config.integer("n_group"),
            "active_groups": config.integer("topk_group"),
        }
    return Variant(
        output_bias=config.flag("attention_bias"),
        experts=latents.experts(config, normalized=False),
        latents=latents.latents(config),
        fields=fields,
        factors=latents.factors(config),
        layout=latents.layout(config, neighbours=True),
    )
