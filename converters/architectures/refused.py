"""Options of a config.json that change the arithmetic and that nothing here computes, and activations."""

from typing import Final

from edgert.config import Activation
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import UnsupportedError

ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}

# Fields of models that share these names but compute something else (Granite, MiniCPM, Gemma,
# OLMo, Cohere, mixtures of experts, adapters), each with the values that change nothing. A variant
# that computes one says so.
# transformers ignores some of them; a checkpoint that sets one was not trained without it.
REFUSED: Final[dict[str, tuple[object, ...]]] = {
    "quantization_config": (),
    "compression_config": (),
    "pretraining_tp": (1,),
    "rotary_pct": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_parallel_residual": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_mrope": (False,),
    "alibi": (False,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "per_layer_config": (),
    "pruned_heads": ({},),
}


def refuse(config: HfConfig, understood: frozenset[str], class_name: str) -> None:
    """UnsupportedError for an option of REFUSED that is not in `understood`, or a model of another class."""
    for key, neutral in REFUSED.items():
        if key in understood:
            continue
        config.refuse_unless(key, *neutral)
    model_type = config.text("model_type")
    expected = class_name or f"{model_type.replace('_', '')}ForCausalLM"
    found = config.texts("architectures")
    if found and expected.lower() not in (name.lower() for name in found):
        raise UnsupportedError(
            f"{config.where}: found architectures {shown(found)}, expected {expected} for model_type "
            f"{model_type}; convert the language model itself"
        )
    code = config.child("auto_map").text("AutoModelForCausalLM", "")
    # Some models were published with code of their own before transformers had the same.
    modules = (model_type, model_type.rpartition("_v")[0])  # DeepSeek's is called modeling_deepseek
    known = [f"modeling_{name}.{expected}".lower() for name in modules]
    if code and code.rpartition("--")[2].lower() not in known:
        raise UnsupportedError(
            f"{config.where}: found auto_map, a model with code of its own, expected transformers' "
            f"{expected}; convert a version without custom code"
        )


def activation_of(config: HfConfig) -> Activation:
    """The activation that `hidden_act` names."""
    name = config.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"{config.where}: found hidden_act {shown(name)}, expected one of {', '.join(ACTIVATIONS)}; "
            "convert another version of the model"
        )
    return ACTIVATIONS[name]
