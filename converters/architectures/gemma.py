"""Gemma (transformers' modeling_gemma.py): gains of 1 + w, an embedding times the root of its width.

The 1 is added and the root multiplied in when the file is written, so the engine computes Llama's block.
"""

from typing import Any, Final

from edgert.converters.architectures.family import Variant, model_width
from edgert.converters.hf_config import HfConfig

DEFAULTS: Final[dict[str, Any]] = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
}
GAINS: Final = frozenset(("attention_norm", "ffn_norm", "output_norm"))


def variant(config: HfConfig) -> Variant:
    """What a gemma config says beyond the fields of the family."""
    bias = config.flag("attention_bias")
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        head_dim=256,
        keys={"hidden_act": "hidden_activation"},  # some files give both, the first of them wrong
        defaults=DEFAULTS,
        factors={"token_embedding": model_width(config) ** 0.5},
        one_more=GAINS,
    )
