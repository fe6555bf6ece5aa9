"""Falcon (transformers' modeling_falcon.py): three ways to place its norms, rope or ALiBi, a plain MLP.

Its first models share one key head and one norm; those with new_decoder_architecture have groups of heads
and two norms; those with ALiBi (falcon-rw) are not parallel. q, k and v lie together by key head.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.architectures.cuts import Grouped, Layout
from edgert.converters.architectures.family import PLAIN, Variant, head_size, without_rope
from edgert.converters.architectures.names import NORM_BIASES
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import UnsupportedError

NAMES: Final = NORM_BIASES | {
    "token_embedding": "transformer.word_embeddings.weight",
    "output_norm": "transformer.ln_f.weight",
    "output_norm_bias": "transformer.ln_f.bias",
    "o": "self_attention.dense.weight",
    "o_bias": "self_attention.dense.bias",
    "up": "mlp.dense_h_to_4h.weight",
    "up_bias": "mlp.dense_h_to_4h.bias",
    "down": "mlp.dense_4h_to_h.weight",
    "down_bias": "mlp.dense_4h_to_h.bias",
}
TWO_NORMS: Final = {
    "attention_norm": "ln_attn.weight",
    "attention_norm_bias": "ln_attn.bias",
    "ffn_norm": "ln_mlp.weight",
    "ffn_norm_bias": "ln_mlp.bias",
}
MOST_HEADS: Final = 1 << 12
"""Published models have up to 232; a slope is made for each that a config claims."""


def variant(config: HfConfig) -> Variant:
    """What a falcon config says beyond the fields of the family."""
    bias, grouped = config.flag("bias"), config.flag("new_decoder_architecture")
    parallel, alibi = config.flag("parallel_attn", True), config.flag("alibi")
    if grouped and not parallel:
        raise UnsupportedError(
            f"{config.where}: found new_decoder_architecture without parallel_attn, expected both; "
            "convert another version of the model"
        )
    config.refuse_unless("apply_residual_connection_post_layernorm", False)
    heads = config.integer("num_attention_heads", most=MOST_HEADS)
    kv_heads = config.integer("num_kv_heads", heads)
    if not grouped:
        kv_heads = 1 if config.flag("multi_query", True) else heads
    norms = config.integer("num_ln_in_parallel_attn", 2 if grouped else 1)
    if norms > (2 if grouped else 1):
        raise UnsupportedError(
            f"{config.where}: found num_ln_in_parallel_attn {shown(norms)}, expected 1, or 2 with "
            "new_decoder_architecture; convert another version of the model"
        )
    d, width = head_size(config), config.integer("hidden_size")
    more: dict[str, Any] = {"alibi": True, "ropes": without_rope(config)} if alibi else {}
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        fields={
            "block": "parallel" if parallel else "pre",
            "shared_norm": parallel and norms == 1,
            **PLAIN,
            **more,
        },
        keys={
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation",
            "intermediate_size": "ffn_hidden_size",
        },
        defaults={
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "intermediate_size": 4 * width,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        layout=Layout(
            names=NAMES | (TWO_NORMS if parallel and norms == 2 else {}),
            layers="transformer.h.",
            cuts={
                "self_attention.query_key_value.weight": Grouped(heads, kv_heads, d),
                "self_attention.query_key_value.bias": Grouped(heads, kv_heads, d, "_bias"),
            },
        ),
        computed={"alibi_slopes": slopes(heads) * np.float32(d**-0.5)} if alibi else {},
        understood=frozenset({"alibi"}),
    )


def slopes(heads: int) -> NDArray[np.float32]:
    """ALiBi's slope of each head: powers of 2^(-8/n), n the power of two below (Press et al., 2022).

    Where the heads are more than n, the others take every second slope of 2n heads. Falcon divides scores
    with their bias by d^1/2, the bias too.
    """
    n = 1 << int(math.log2(heads))
    first = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    others = [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (heads - n) + 1, 2)]
    return np.array(first + others, np.float32)
