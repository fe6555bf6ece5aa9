"""Granite 3 (transformers' modeling_granite.py): Llama with four multipliers.

Each multiplies the output of a matrix or a gain, so it is multiplied into that when the file is
written, and the engine knows nothing of it: a residual step m (W h + b) = (m W) h + m b, a score
a (Wq x)^T k = d^-1/2 (a d^1/2 Wq x)^T k, an embedding e E, logits E (g / s) x. Where E is both, the last
gain is also divided by e (`Decoder.factor`).
"""

from typing import Final

from edgert.converters.architectures.family import Variant, head_size
from edgert.converters.architectures.windows import refuse_windows
from edgert.converters.hf_config import HfConfig

MULTIPLIERS: Final = frozenset(
    ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
)


def variant(config: HfConfig) -> Variant:
    """What a granite config says beyond the fields of the family."""
    refuse_windows(config)
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=config.flag("mlp_bias"),
        factors=factors(config, "down"),
        understood=MULTIPLIERS,
    )


def factors(config: HfConfig, down: str) -> dict[str, float]:
    """The multipliers as factors of tensors; `down` is the matrix that ends the feed-forward."""
    residual = config.number("residual_multiplier", 1.0)
    scores = config.number("attention_multiplier", 1.0) * head_size(config) ** 0.5
    return {
        "token_embedding": config.number("embedding_multiplier", 1.0),
        "q": scores,
        "q_bias": scores,
        "o": residual,
        "o_bias": residual,
        down: residual,
        f"{down}_bias": residual,
        "output_norm": 1.0 / config.number("logits_scaling", 1.0),
    }
