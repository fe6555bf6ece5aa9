"""OLMoE (transformers' modeling_olmoe.py): norms over all heads of q and of k together."""

from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.architectures.windows import refuse_windows
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What an olmoe config says beyond the fields of the family."""
    refuse_windows(config)
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        joint_qk_norm=True,
        experts=Experts(
            count=config.integer("num_experts", 64),
            active=config.integer("num_experts_per_tok", 8),
            width=config.integer("intermediate_size"),
            normalized=config.flag("norm_topk_prob"),
        ),
        understood=frozenset({"num_experts"}),
    )
