"""Tiny configurations of architectures with LayerNorm, most of them without a gate."""

from typing import Any

from tests.tiny_base import Config, base_config, without


def _starcoder2(**options: Any) -> Config:
    own = {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 0.01,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_bias": True,
    }
    return without(
        base_config("starcoder2", "Starcoder2ForCausalLM", **own | options), "rms_norm_eps", "head_dim"
    )


def _stablelm(**options: Any) -> Config:
    own = {
        "layer_norm_eps": 0.01,
        "qk_layernorm": False,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 100.0, "rope_type": "default"},
        "use_parallel_residual": False,
        "use_qkv_bias": False,
    }
    return without(
        base_config("stablelm", "StableLmForCausalLM", **own | options), "rms_norm_eps", "head_dim"
    )


def _cohere(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "layer_norm_eps": 1e-05,
        "logit_scale": 0.5,
        "tie_word_embeddings": True,
        "use_qk_norm": False,
    }
    return without(base_config("cohere", "CohereForCausalLM", **own | options), "rms_norm_eps", "head_dim")


def _cohere2(**options: Any) -> Config:
    own = {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 12,
    }
    named = {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2"}
    config = _cohere(**own | options) | named
    return without(config, "use_qk_norm")


def _gpt2(**options: Any) -> Config:
    own = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_inner": None,
        "n_layer": 2,
        "n_positions": 64,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "vocab_size": 128,
    }
    return own | options


def _gpt_neox(**options: Any) -> Config:
    own = {
        "attention_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 100.0, "rope_type": "default"},
        "use_parallel_residual": True,
    }
    config = base_config("gpt_neox", "GPTNeoXForCausalLM", **own | options)
    return without(config, "rms_norm_eps", "head_dim", "num_key_value_heads")


def _opt(**options: Any) -> Config:
    own = {
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "enable_bias": True,
        "ffn_dim": 96,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
        "word_embed_proj_dim": options.get("hidden_size", 64),
    }
    config = base_config("opt", "OPTForCausalLM", **own | options)
    unused = ("head_dim", "hidden_act", "intermediate_size", "num_key_value_heads", "rms_norm_eps")
    return without(config, *unused, "rope_parameters")


def _falcon(**options: Any) -> Config:
    own = {
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "ffn_hidden_size": 96,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": None,
        "parallel_attn": True,
        "tie_word_embeddings": True,
    }
    config = base_config("falcon", "FalconForCausalLM", **own | options)
    return without(
        config, "head_dim", "hidden_act", "intermediate_size", "num_key_value_heads", "rms_norm_eps"
    )


PLAIN: dict[str, Config] = {
    # starcoder2: LayerNorm with biases, no gate, with its biases or without
    "starcoder2_biases_window": _starcoder2(sliding_window=10, norm_epsilon=1e-05),
    "starcoder2_plain_untied": _starcoder2(
        use_bias=False, tie_word_embeddings=False, hidden_size=40, intermediate_size=172, vocab_size=99
    ),
    # stablelm: LayerNorm before a gated feed-forward, in turn or side by side; a quarter of a head rotated
    "stablelm_biases": _stablelm(use_qkv_bias=True),
    "stablelm_parallel": _stablelm(use_parallel_residual=True, intermediate_size=88),
    # cohere: one LayerNorm without bias, side by side, neighbours rotated, scaled logits
    "cohere_tied": _cohere(),
    "cohere_biases": _cohere(
        attention_bias=True, layer_norm_eps=0.05, logit_scale=2.0, tie_word_embeddings=False
    ),
    # cohere2: windows in some layers, and rope in those alone
    "cohere2_hybrid": _cohere2(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
    # gpt2: learned positions, fused and transposed matrices
    "gpt2_defaults": _gpt2(),
    "gpt2_relu_odd_sizes": _gpt2(
        activation_function="relu", n_embd=40, n_inner=172, layer_norm_epsilon=0.01, vocab_size=99
    ),
    # gpt_neox: two LayerNorms side by side or in turn; q, k and v of each head together
    "gpt_neox_parallel": _gpt_neox(),
    "gpt_neox_in_turn": _gpt_neox(attention_bias=False, use_parallel_residual=False, intermediate_size=88),
    "gpt_neox_v4": without(_gpt_neox(tie_word_embeddings=True), "rope_parameters")
    | {"rotary_pct": 0.5, "rotary_emb_base": 1000},
    # opt: learned positions from the third row on
    "opt_relu": _opt(),
    "opt_gelu_odd_sizes": _opt(activation_function="gelu", hidden_size=48, ffn_dim=172, vocab_size=99),
    # falcon: one key head; groups of heads with one norm or two; ALiBi in turn
    "falcon_multi_query": _falcon(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
    "falcon_groups_two_norms": _falcon(new_decoder_architecture=True, bias=True),
    "falcon_groups_one_norm": _falcon(
        new_decoder_architecture=True, num_ln_in_parallel_attn=1, tie_word_embeddings=False
    ),
    "falcon_alibi": _falcon(alibi=True, bias=True, multi_query=False, num_kv_heads=4, parallel_attn=False),
    "falcon_alibi_six_heads": _falcon(
        alibi=True,
        hidden_size=48,
        num_attention_heads=6,
        num_kv_heads=6,
        multi_query=False,
        parallel_attn=False,
    ),
}
