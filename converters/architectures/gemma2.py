"""Gemma 2 (transformers' modeling_gemma2.py): norms around each part, soft caps, windows in some layers."""

import math
from typing import Final

from edgert.converters.architectures import gemma
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant, model_width
from edgert.converters.architectures.windows import layer_kinds, typed_windows, window_size
from edgert.converters.hf_config import HfConfig
from edgert.converters.rope import MAX_HEAD_DIM

NAMES: Final = {
    "attention_post_norm": "post_attention_layernorm.weight",
    "ffn_norm": "pre_feedforward_layernorm.weight",
    "ffn_post_norm": "post_feedforward_layernorm.weight",
}
KEYS: Final = {"hidden_act": "hidden_activation"}
GAINS: Final = gemma.GAINS | {"attention_post_norm", "ffn_post_norm"}
UNDERSTOOD: Final = frozenset(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"))


def variant(config: HfConfig) -> Variant:
    """What a gemma2 config says beyond the fields of the family."""
    bias = config.flag("attention_bias")
    scores = score_factor(config)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        head_dim=256,
        windows=typed_windows(config, layer_kinds(config, 2), window_size(config)),
        fields={
            "block": "around",
            "attention_cap": cap(config, "attn_logit_softcapping", 50.0),
            "logit_cap": cap(config, "final_logit_softcapping", 30.0),
        },
        keys=KEYS,
        defaults=gemma.DEFAULTS,
        layout=Layout(names=NAMES),
        factors={"token_embedding": model_width(config) ** 0.5, "q": scores, "q_bias": scores},
        one_more=GAINS,
        understood=UNDERSTOOD,
    )


def score_factor(config: HfConfig) -> float:
    """What q is multiplied by, so that scores over d^1/2 are those over query_pre_attn_scalar^1/2."""
    head_dim = config.integer("head_dim", 256, most=MAX_HEAD_DIM)
    return math.sqrt(head_dim / config.number("query_pre_attn_scalar", 256.0))


def cap(config: HfConfig, key: str, usual: float | None) -> float:
    """A soft cap, 0 for none: a null, or an absent one that usually is."""
    if not config.has(key) and (key in config.values or usual is None):
        return 0.0
    return config.number(key, usual)
