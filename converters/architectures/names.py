"""How checkpoints name the tensors of `edgert.format.declared`."""

from collections.abc import Mapping
from typing import Final

LAYERS: Final = "model.layers."
"""What opens the name of every tensor of a layer, before its number."""
_TOP_NAMES: Final = {
    "token_embedding": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k": "self_attn.k_proj.weight",
    "k_bias": "self_attn.k_proj.bias",
    "v": "self_attn.v_proj.weight",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "ffn_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "shared_router": "mlp.shared_expert_gate.weight",
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
    "experts.gate": "mlp.experts.{}.gate_proj.weight",
    "experts.up": "mlp.experts.{}.up_proj.weight",
    "experts.down": "mlp.experts.{}.down_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up": "mlp.up_proj.weight",
    "up_bias": "mlp.up_proj.bias",
    "down": "mlp.down_proj.weight",
    "down_bias": "mlp.down_proj.bias",
}

NORM_BIASES: Final = {
    "attention_norm_bias": "input_layernorm.bias",
    "ffn_norm_bias": "post_attention_layernorm.bias",
    "output_norm_bias": "model.norm.bias",
}
"""Of those whose norms are LayerNorms."""


def source_name(name: str, own: Mapping[str, str] | None = None, layers: str = LAYERS) -> str:
    """The Hugging Face name of a tensor of `edgert.format.declared`, or of one matrix of an expert.

    The same in the whole Llama family but for the names in `own`. Exit heads and predictors are ours and have
    one name.
    """
    if name.startswith("exits.") or ".predictor_" in name:
        return name
    part, layer, expert = parts_of(name)
    known = _TOP_NAMES | _LAYER_NAMES | dict(own or {})
    if layer is None:
        return known[part]
    return f"{layers}{layer}.{known[part].format(expert)}"


def parts_of(name: str) -> tuple[str, str | None, str | None]:
    """ "layers.3.experts.5.up" to ("experts.up", "3", "5"), "layers.3.q" to ("q", "3", None)."""
    match name.split("."):
        case ["layers", layer, "experts", expert, part]:
            return f"experts.{part}", layer, expert
        case ["layers", layer, part]:
            return part, layer, None
    return name, None, None
