"""Mixtral (transformers' modeling_mixtral.py): normalised weights, one sliding window for every layer."""

from typing import Final

from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.architectures.windows import every_layer
from edgert.converters.hf_config import HfConfig

NAMES: Final = {
    "router": "block_sparse_moe.gate.weight",
    "experts.gate": "block_sparse_moe.experts.{}.w1.weight",
    "experts.up": "block_sparse_moe.experts.{}.w3.weight",
    "experts.down": "block_sparse_moe.experts.{}.w2.weight",
}


def variant(config: HfConfig) -> Variant:
    """What a mixtral config says beyond the fields of the family."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("layer_types")
    return Variant(
        windows=every_layer(config),
        experts=Experts(
            count=config.integer("num_local_experts", 8),
            active=config.integer("num_experts_per_tok", 2),
            width=config.integer("intermediate_size"),
            normalized=True,
        ),
        layout=Layout(names=NAMES),
        understood=frozenset({"num_local_experts"}),
    )
