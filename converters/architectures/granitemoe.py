"""Granite 3 with experts (transformers' modeling_granitemoe.py): Mixtral with four multipliers.

Each multiplies the output of a matrix or a gain, so it is multiplied into that when the file is
written, and the engine knows nothing of it: a residual step m (W h + b) = (m W) h + m b, a score
a (Wq x)^T k = d^-1/2 (a d^1/2 Wq x)^T k, an embedding e E, logits E (g / s) x. Where E is both, the last
gain is also divided by e (`Decoder.factor`).
"""

from typing import Final

from edgert.converters.architectures import mixtral
from edgert.converters.architectures.family import Experts, Variant
from edgert.converters.hf_config import HfConfig

FUSED: Final = {
    "block_sparse_moe.input_linear.weight": ("experts.gate", "experts.up"),
    "block_sparse_moe.output_linear.weight": ("experts.down",),
}
"""Tensors of all experts of a layer, [E, rows, columns], and the matrices that lie in the rows of each."""


def variant(config: HfConfig) -> Variant:
    """What a granitemoe config says beyond the fields of the family."""
    config.refuse_unless("mlp_bias", False)
    config.refuse_unless("sliding_window")
    config.refuse_unless("layer_types")
    bias = config.flag("attention_bias")
    heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", max(1, config.integer("hidden_size") // heads))
    residual = config.number("residual_multiplier", 1.0)
    scores = config.number("attention_multiplier", 1.0) * head_dim**0.5
    factors = {
        "token_embedding": config.number("embedding_multiplier", 1.0),
        "q": scores,
        "q_bias": scores,
        "o": residual,
        "o_bias": residual,
        "experts.down": residual,
        "output_norm": 1.0 / config.number("logits_scaling", 1.0),
    }
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        experts=Experts(
            count=config.integer("num_local_experts", 8),
            active=config.integer("num_experts_per_tok", 2),
            width=config.integer("intermediate_size"),
            normalized=True,
        ),
        names=mixtral.NAMES | {"router": "block_sparse_moe.router.layer.weight"},
        fused=FUSED,
        factors=factors,
        understood=frozenset(
            ("num_local_experts", "embedding_multiplier", "residual_multiplier", "logits_scaling")
        )
        | {"attention_multiplier"},
    )
