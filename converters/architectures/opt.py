"""OPT (transformers' modeling_opt.py): learned positions, the first two rows of which no token has."""

from typing import Final

from edgert.converters.architectures.cuts import Layout, Shifted
from edgert.converters.architectures.family import Variant, learned_positions
from edgert.converters.hf_config import HfConfig

NAMES: Final = {
    "token_embedding": "model.decoder.embed_tokens.weight",
    "position_embedding": "model.decoder.positions",
    "output_norm": "model.decoder.final_layer_norm.weight",
    "output_norm_bias": "model.decoder.final_layer_norm.bias",
    "attention_norm": "self_attn_layer_norm.weight",
    "attention_norm_bias": "self_attn_layer_norm.bias",
    "ffn_norm": "final_layer_norm.weight",
    "ffn_norm_bias": "final_layer_norm.bias",
    "o": "self_attn.out_proj.weight",
    "o_bias": "self_attn.out_proj.bias",
    "up": "fc1.weight",
    "up_bias": "fc1.bias",
    "down": "fc2.weight",
    "down_bias": "fc2.bias",
}
UNUSED_POSITIONS: Final = 2


def variant(config: HfConfig) -> Variant:
    """What an opt config says beyond the fields of the family."""
    config.refuse_unless("do_layer_norm_before", True)
    config.refuse_unless("enable_bias", True)
    config.refuse_unless("layer_norm_elementwise_affine", True)
    config.refuse_unless("_remove_final_layer_norm", False)
    config.refuse_unless("word_embed_proj_dim", config.integer("hidden_size"))
    positions = config.integer("max_position_embeddings", 2048)
    return Variant(
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        fields=learned_positions(config),
        keys={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={
            "max_position_embeddings": 2048,
            "hidden_act": "relu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        layout=Layout(
            names=NAMES,
            layers="model.decoder.layers.",
            base="model.",
            cuts={
                "model.decoder.embed_positions.weight": Shifted(
                    "position_embedding", UNUSED_POSITIONS, positions
                )
            },
        ),
    )
