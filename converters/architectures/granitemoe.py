"""Granite 3 with experts (transformers' modeling_granitemoe.py): Mixtral with Granite's multipliers."""

from typing import Final

from edgert.converters.architectures import granite, mixtral
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.architectures.windows import refuse_windows
from edgert.converters.hf_config import HfConfig

FUSED: Final = {
    "block_sparse_moe.input_linear.weight": ("experts.gate", "experts.up"),
    "block_sparse_moe.output_linear.weight": ("experts.down",),
}
"""Tensors of all experts of a layer, [E, rows, columns], and the matrices that lie in the rows of each."""


def variant(config: HfConfig) -> Variant:
    """What a granitemoe config says beyond the fields of the family."""
    config.refuse_unless("mlp_bias", False)
    refuse_windows(config)
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        experts=Experts(
            count=config.integer("num_local_experts", 8),
            active=config.integer("num_experts_per_tok", 2),
            width=config.integer("intermediate_size"),
            normalized=True,
        ),
        layout=Layout(
            names=mixtral.NAMES | {"router": "block_sparse_moe.router.layer.weight"},
            experts=FUSED,
        ),
        factors=granite.factors(config, "experts.down"),
        understood=granite.MULTIPLIERS | {"num_local_experts"},
    )
