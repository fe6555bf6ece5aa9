"""Qwen 1.5 and 2 with experts (transformers' modeling_qwen2_moe.py): biases on q, k, v, a shared expert."""

from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.architectures.windows import dense_layers, layer_windows
from edgert.converters.hf_config import HfConfig
from edgert.errors import UnsupportedError


def variant(config: HfConfig) -> Variant:
    """What a qwen2_moe config says beyond the fields of the family."""
    config.refuse_unless("attention_bias")
    config.refuse_unless("mlp_bias", False)
    if config.flag("use_sliding_window") and not config.texts("layer_types"):
        # transformers 4 and 5 give such a model windows in different layers.
        raise UnsupportedError(
            f"{config.where}: found use_sliding_window without layer_types, expected both or neither; "
            "convert another version of the model"
        )
    return Variant(
        qkv_bias=config.flag("qkv_bias", True),
        windows=layer_windows(config),
        experts=Experts(
            count=config.integer("num_experts", 60),
            active=config.integer("num_experts_per_tok", 4),
            width=config.integer("moe_intermediate_size", 1408),
            normalized=config.flag("norm_topk_prob"),
            shared_width=config.integer("shared_expert_intermediate_size", 5632),
            dense_layers=dense_layers(config),
        ),
        understood=frozenset({"num_experts"}),
    )
