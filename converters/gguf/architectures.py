"""The architectures of llama.cpp that edgert runs: what they are here, and how their tensors are named."""

from dataclasses import dataclass
from typing import Final

from edgert.converters.architectures.names import source_name

ROPE_FACTORS: Final = "rope_freqs.weight"
"""[d/2]: what Llama 3 divides each frequency by; llama.cpp's converter computes it."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture's name says that the keys do not."""

    dense: str = ""  # the Hugging Face model_type; "" if it always has experts
    experts: str = ""  # the model_type with experts; "" if it never has any
    # llama.cpp computes Llama's rotary embedding on neighbouring dimensions and its converter
    # reorders the rows of q and k for it; elsewhere it keeps the halves of a head apart, as we do.
    interleaved: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    normalized: bool = False  # the weights of a token's experts are divided by their sum


ARCHITECTURES: Final = {
    "llama": Architecture("llama", "mixtral", interleaved=True, normalized=True),  # Mistral too
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", qk_norm=True),
    "qwen2moe": Architecture("", "qwen2_moe"),
    "qwen3moe": Architecture("", "qwen3_moe", qk_norm=True, normalized=True),
    "olmoe": Architecture("", "olmoe", joint_qk_norm=True),
}

REFUSED: Final[dict[str, tuple[object, ...]]] = {
    "use_parallel_residual": (False,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
    "attention.sliding_window_pattern": (),
    "attention.key_length_mla": (),
    "rope.dimension_sections": (),
    "rope.scale_linear": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),
}
"""What models of other architectures set, each with the values that change nothing."""

_TOP_NAMES: Final = {
    "token_embedding": "token_embd.weight",
    "position_embedding": "position_embd.weight",
    "output_norm": "output_norm.weight",
    "output_norm_bias": "output_norm.bias",
    "output": "output.weight",
}
_LAYER_NAMES: Final = {
    "attention_norm": "attn_norm.weight",
    "attention_norm_bias": "attn_norm.bias",
    "attention_post_norm": "post_attention_norm.weight",
    "q": "attn_q.weight",
    "q_bias": "attn_q.bias",
    "k": "attn_k.weight",
    "k_bias": "attn_k.bias",
    "v": "attn_v.weight",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "ffn_norm": "ffn_norm.weight",
    "ffn_norm_bias": "ffn_norm.bias",
    "ffn_post_norm": "post_ffw_norm.weight",
    "gate": "ffn_gate.weight",
    "gate_bias": "ffn_gate.bias",
    "up": "ffn_up.weight",
    "up_bias": "ffn_up.bias",
    "down": "ffn_down.weight",
    "down_bias": "ffn_down.bias",
    "router": "ffn_gate_inp.weight",
    "shared_router": "ffn_gate_inp_shexp.weight",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
}
EXPERT_NAMES: Final = {
    "gate": "ffn_gate_exps.weight",
    "up": "ffn_up_exps.weight",
    "down": "ffn_down_exps.weight",
}
"""Tensors of all experts of a layer, [E, rows, columns]."""


NAMES: Final = (
    _TOP_NAMES | _LAYER_NAMES | {f"experts.{part}": f"{name}.{{}}" for part, name in EXPERT_NAMES.items()}
)
"""What llama.cpp calls a tensor of `edgert.format.declared`, by its name in its layer.

A matrix of one expert, which it stores within a larger tensor, gets that one's name and its number:
blk.3.ffn_up_exps.weight.5.
"""
LAYERS: Final = "blk."


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of `edgert.format.declared`."""
    return source_name(name, NAMES, LAYERS)
