"""GPT-2 (transformers' modeling_gpt2.py): learned positions, LayerNorm, matrices stored transposed."""

from typing import Final

from edgert.converters.architectures.cuts import Layout, Stacked
from edgert.converters.architectures.family import Variant, learned_positions
from edgert.converters.hf_config import HfConfig

NAMES: Final = {
    "token_embedding": "transformer.wte.weight",
    "position_embedding": "transformer.wpe.weight",
    "output_norm": "transformer.ln_f.weight",
    "output_norm_bias": "transformer.ln_f.bias",
    "attention_norm": "ln_1.weight",
    "attention_norm_bias": "ln_1.bias",
    "ffn_norm": "ln_2.weight",
    "ffn_norm_bias": "ln_2.bias",
    "o": "attn.c_proj.weight",
    "o_bias": "attn.c_proj.bias",
    "up": "mlp.c_fc.weight",
    "up_bias": "mlp.c_fc.bias",
    "down": "mlp.c_proj.weight",
    "down_bias": "mlp.c_proj.bias",
}
KEYS: Final = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}


def variant(config: HfConfig) -> Variant:
    """What a gpt2 config says beyond the fields of the family."""
    width = config.integer("n_embd", 768)
    return Variant(
        qkv_bias=True,
        output_bias=True,
        ffn_bias=True,
        fields=learned_positions(config.renamed(KEYS, {"num_hidden_layers": 12})),
        class_name="GPT2LMHeadModel",
        keys=KEYS,
        defaults={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 4 * width,
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        layout=Layout(
            names=NAMES,
            layers="transformer.h.",
            base="transformer.",
            cuts={
                "attn.c_attn.weight": Stacked({"q": width, "k": width, "v": width}),
                "attn.c_attn.bias": Stacked({"q_bias": width, "k_bias": width, "v_bias": width}),
            },
            transposed=frozenset(
                ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
            ),
            ignored=(".attn.bias", ".attn.masked_bias"),
        ),
    )
