"""GPT-NeoX and Pythia (transformers' modeling_gpt_neox.py): parallel blocks of two LayerNorms, a plain MLP.

q, k and v of each head lie together in one matrix.
"""

from typing import Final

from edgert.converters.architectures.cuts import Grouped, Layout
from edgert.converters.architectures.family import PLAIN, Variant, head_size
from edgert.converters.architectures.names import NORM_BIASES
from edgert.converters.hf_config import HfConfig

NAMES: Final = NORM_BIASES | {
    "token_embedding": "gpt_neox.embed_in.weight",
    "output_norm": "gpt_neox.final_layer_norm.weight",
    "output_norm_bias": "gpt_neox.final_layer_norm.bias",
    "output": "embed_out.weight",
    "o": "attention.dense.weight",
    "o_bias": "attention.dense.bias",
    "up": "mlp.dense_h_to_4h.weight",
    "up_bias": "mlp.dense_h_to_4h.bias",
    "down": "mlp.dense_4h_to_h.weight",
    "down_bias": "mlp.dense_4h_to_h.bias",
}


def variant(config: HfConfig) -> Variant:
    """What a gpt_neox config says beyond the fields of the family."""
    bias = config.flag("attention_bias", True)
    heads, d = config.integer("num_attention_heads"), head_size(config)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=True,
        fields={**PLAIN, "block": "parallel" if config.flag("use_parallel_residual", True) else "pre"},
        keys={
            "rms_norm_eps": "layer_norm_eps",
            "partial_rotary_factor": "rotary_pct",
            "rope_theta": "rotary_emb_base",
        },
        defaults={"hidden_act": "gelu", "rms_norm_eps": 1e-5},
        layout=Layout(
            names=NAMES,
            layers="gpt_neox.layers.",
            cuts={
                "attention.query_key_value.weight": Grouped(heads, heads, d),
                "attention.query_key_value.bias": Grouped(heads, heads, d, "_bias"),
            },
            renamed={"lm_head.weight": "embed_out.weight"},  # as transformers 5 writes it
            ignored=(".attention.bias", ".attention.masked_bias"),
        ),
        partial_rotary=0.25,
        understood=frozenset(("rotary_pct", "use_parallel_residual")),
    )
