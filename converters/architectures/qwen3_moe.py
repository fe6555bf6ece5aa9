"""Qwen 3 with experts (transformers' modeling_qwen3_moe.py): norms on each head of q and k."""

from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.architectures.windows import dense_layers, layer_count, window_size
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a qwen3_moe config says beyond the fields of the family."""
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("layer_types")
    bias = config.flag("attention_bias")
    window = window_size(config) if config.flag("use_sliding_window") else 0
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=(window,) * layer_count(config),
        experts=Experts(
            count=config.integer("num_experts", 128),
            active=config.integer("num_experts_per_tok", 8),
            width=config.integer("moe_intermediate_size", 768),
            normalized=config.flag("norm_topk_prob"),
            dense_layers=dense_layers(config),
        ),
        understood=frozenset({"num_experts"}),
    )
