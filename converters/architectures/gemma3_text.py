"""Gemma 3, text only (transformers' modeling_gemma3.py): norms of q and k, and two rotary bases.

Layers with a window turn by `rope_local_base_freq`, the others by `rope_theta`.
"""

from typing import Final

from edgert.config import GLOBAL_ROPE, LOCAL_ROPE
from edgert.converters.architectures import gemma, gemma2
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant, model_width, rope_of_kind
from edgert.converters.architectures.windows import layer_kinds, typed_windows, window_size
from edgert.converters.hf_config import HfConfig

DEFAULTS: Final = gemma.DEFAULTS | {"max_position_embeddings": 131072}


def variant(config: HfConfig) -> Variant:
    """What a gemma3_text config says beyond the fields of the family."""
    bias = config.flag("attention_bias")
    kinds = layer_kinds(config, config.integer("sliding_window_pattern", 6))
    ropes = tuple(LOCAL_ROPE if kind == "sliding_attention" else GLOBAL_ROPE for kind in kinds)
    scores = gemma2.score_factor(config)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        head_dim=256,
        windows=typed_windows(config, kinds, window_size(config)),
        fields={
            "block": "around",
            "ropes": ropes if LOCAL_ROPE in ropes else (),
            "logit_cap": gemma2.cap(config, "final_logit_softcapping", None),
        },
        class_name="Gemma3ForCausalLM",
        keys=gemma2.KEYS,
        defaults=DEFAULTS,
        layout=Layout(names=gemma2.NAMES),
        # The norm of q hides a factor in its matrix; it has to be in the gain.
        factors={"token_embedding": model_width(config) ** 0.5, "q_norm": scores},
        one_more=gemma2.GAINS | {"q_norm", "k_norm"},
        rope=rope_of_kind(config, "full_attention", "rope_theta", 1000000.0),
        local_rope=rope_of_kind(config, "sliding_attention", "rope_local_base_freq", 10000.0),
        understood=gemma2.UNDERSTOOD - {"attn_logit_softcapping"},
    )
