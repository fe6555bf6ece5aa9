"""StarCoder 2 (transformers' modeling_starcoder2.py): LayerNorm, and a feed-forward without a gate."""

from typing import Final

from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import PLAIN, Variant
from edgert.converters.architectures.names import NORM_BIASES
from edgert.converters.architectures.windows import every_layer
from edgert.converters.hf_config import HfConfig

NAMES: Final = NORM_BIASES | {
    "up": "mlp.c_fc.weight",
    "up_bias": "mlp.c_fc.bias",
    "down": "mlp.c_proj.weight",
    "down_bias": "mlp.c_proj.bias",
}


def variant(config: HfConfig) -> Variant:
    """What a starcoder2 config says beyond the fields of the family."""
    config.refuse_unless("layer_types")
    bias = config.flag("use_bias", True)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        windows=every_layer(config),
        fields=PLAIN,
        keys={"rms_norm_eps": "norm_epsilon"},
        defaults={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5},
        layout=Layout(names=NAMES),
    )
