"""Tiny configurations of every supported architecture, each a whole `config.json`.

Together they turn on every option that changes the arithmetic; `tests/tiny_models.py` makes models of them.
"""

from typing import Any

from tests.tiny_base import Config, base_config
from tests.tiny_gated import GATED
from tests.tiny_plain import PLAIN
from tests.tiny_routed import ROUTED


def _llama(**options: Any) -> Config:
    own = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    return base_config("llama", "LlamaForCausalLM", **own | options)


def _mistral(**options: Any) -> Config:
    return base_config("mistral", "MistralForCausalLM", **{"sliding_window": None} | options)


def _qwen(model_type: str, class_name: str, **options: Any) -> Config:
    own = {
        "bos_token_id": None,
        "layer_types": ["full_attention"] * options.get("num_hidden_layers", 2),
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return base_config(model_type, class_name, **own | options)


def _qwen2(**options: Any) -> Config:
    config = _qwen("qwen2", "Qwen2ForCausalLM", **options)
    del config["head_dim"]  # qwen2 has no such option: it is always hidden / heads
    return config


def _qwen3(**options: Any) -> Config:
    return _qwen("qwen3", "Qwen3ForCausalLM", **{"attention_bias": False} | options)


def _mixtral(**options: Any) -> Config:
    own = {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": None}
    return base_config("mixtral", "MixtralForCausalLM", **own | options)


def _olmoe(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
    }
    config = base_config("olmoe", "OlmoeForCausalLM", **own | options)
    del config["head_dim"]  # olmoe's norms are made for hidden / heads
    return config


def _qwen2_moe(**options: Any) -> Config:
    own = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 48,
        "norm_topk_prob": False,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 56,
    }
    config = _qwen("qwen2_moe", "Qwen2MoeForCausalLM", **own | options)
    del config["head_dim"]
    return config


def _qwen3_moe(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    return base_config("qwen3_moe", "Qwen3MoeForCausalLM", **own | options)


def _granitemoe(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "residual_multiplier": 0.7,
    }
    return base_config("granitemoe", "GraniteMoeForCausalLM", **own | options)


def _as_version_4(config: Config) -> Config:
    """The same configuration as transformers 4 wrote it: rope keys at top level, few derived keys."""
    old = {key: value for key, value in config.items() if key not in ("head_dim", "layer_types")}
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope["rope_theta"]
    old["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    old["torch_dtype"] = old.pop("dtype")
    return old | {"transformers_version": "4.43.0"}


# Llama 3.1's parameters with a context of 64 instead of 8192. With 12 frequencies, wavelengths
# 6.3 (kept), 19 and 56 (the smooth band, 16 to 64) and 167 and longer (divided) all occur.
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
    "rope_type": "llama3",
}
YARN_ROPE = {
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "rope_type": "yarn",
}

CONFIGS: dict[str, Config] = {
    # llama: head sharing, embeddings, biases, activations, sizes that fill no block
    "llama_mha": _llama(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=8),
    "llama_gqa_tied": _llama(tie_word_embeddings=True, max_position_embeddings=256),
    "llama_mqa_odd_sizes": _llama(
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=172,
        num_hidden_layers=3,
        vocab_size=99,
    ),
    "llama_head_dim": _llama(hidden_size=40, head_dim=24, intermediate_size=88, vocab_size=96),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True, hidden_size=48, head_dim=12),
    "llama_relu_f16": _llama(hidden_act="relu", dtype="float16", hidden_size=32, head_dim=8),
    "llama_relu2": _llama(hidden_act="relu2", hidden_size=48, head_dim=12, vocab_size=112),
    "llama_gelu_tanh": _llama(hidden_act="gelu_pytorch_tanh", hidden_size=48, head_dim=12, rms_norm_eps=0.02),
    # llama: rope
    "llama_rope_linear": _llama(
        rope_parameters={"factor": 4.0, "rope_theta": 10000.0, "rope_type": "linear"},
    ),
    "llama_rope_llama3": _llama(
        rope_parameters=LLAMA3_ROPE, hidden_size=48, head_dim=24, max_position_embeddings=256
    ),
    "llama_rope_llama3_v4": _as_version_4(
        _llama(rope_parameters=LLAMA3_ROPE, num_attention_heads=2, max_position_embeddings=256)
    ),
    "llama_rope_dynamic": _llama(
        rope_parameters={"factor": 4.0, "rope_theta": 10000.0, "rope_type": "dynamic"},
    ),
    "llama_rope_yarn": _llama(rope_parameters=YARN_ROPE, max_position_embeddings=128),
    # mistral: a window in every layer, or none
    "mistral_window": _mistral(sliding_window=8, num_hidden_layers=3),
    "mistral_mqa_tied_head_dim": _mistral(
        hidden_size=40,
        head_dim=24,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        vocab_size=101,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    ),
    "mistral_window_yarn_factor": _mistral(
        hidden_size=40,
        head_dim=10,
        num_key_value_heads=4,
        intermediate_size=172,
        max_position_embeddings=128,
        sliding_window=16,
        rope_parameters=YARN_ROPE | {"attention_factor": 0.8},
    ),
    # qwen2: biases on q, k and v; windows in the upper layers
    "qwen2_gqa_tied": _qwen2(
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    ),
    "qwen2_mqa_unused_window": _qwen2(
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=172,
        vocab_size=103,
        sliding_window=8,
    ),
    "qwen2_mha_window_layers": _qwen2(
        num_key_value_heads=4,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=12,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "qwen2_window_yarn_v4": _as_version_4(
        _qwen2(
            num_hidden_layers=3,
            max_position_embeddings=128,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=2,
            rope_parameters={
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1000000.0,
                "type": "yarn",  # the name of the key before "rope_type"
            },
        )
    ),
    # qwen3: norms on q and k; windows per layer
    "qwen3_gqa_tied_head_dim": _qwen3(
        hidden_size=40,
        head_dim=24,
        tie_word_embeddings=True,
        rms_norm_eps=0.01,
        rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
    ),
    "qwen3_mqa_odd_sizes": _qwen3(
        hidden_size=40,
        head_dim=24,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=172,
        vocab_size=97,
    ),
    "qwen3_mha_biases": _qwen3(attention_bias=True, hidden_size=48, head_dim=12, num_key_value_heads=4),
    "qwen3_alternating_windows": _qwen3(
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=10,
        max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3_rope_yarn_mscale": _qwen3(
        max_position_embeddings=128,
        rope_parameters=YARN_ROPE
        | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 2.5, "mscale_all_dim": 0.5, "truncate": False},
    ),
    # experts: always normalised; sizes that fill no block; one expert of a token; a window
    "mixtral_gqa_tied": _mixtral(tie_word_embeddings=True),
    "mixtral_window_odd_sizes": _mixtral(
        hidden_size=40,
        head_dim=12,
        intermediate_size=44,
        num_experts_per_tok=1,
        num_local_experts=19,
        sliding_window=10,
    ),
    # olmoe: norms over all heads; weights as they are, or normalised
    "olmoe_mha": _olmoe(),
    "olmoe_gqa_biases_normalised": _olmoe(
        attention_bias=True,
        hidden_act="relu",
        hidden_size=48,
        norm_topk_prob=True,
        num_experts_per_tok=2,
        num_key_value_heads=2,
    ),
    # qwen2_moe: a shared expert behind a gate; dense layers of another width
    "qwen2_moe_shared": _qwen2_moe(),
    "qwen2_moe_dense_layers": _qwen2_moe(
        decoder_sparse_step=2,
        mlp_only_layers=[3],
        num_hidden_layers=4,
        norm_topk_prob=True,
        qkv_bias=False,
        layer_types=["full_attention"] * 4,
    ),
    "qwen2_moe_window": _qwen2_moe(
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    # qwen3_moe: normalised or not; norms of heads
    "qwen3_moe_gqa_tied": _qwen3_moe(hidden_size=40, head_dim=24, tie_word_embeddings=True),
    "qwen3_moe_biases_window": _qwen3_moe(
        attention_bias=True,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        sliding_window=10,
        use_sliding_window=True,
    ),
    # granitemoe: every multiplier, with the embedding shared and not
    "granitemoe_tied": _granitemoe(tie_word_embeddings=True, attention_bias=True),
    "granitemoe_untied": _granitemoe(hidden_size=48, head_dim=12),
    **GATED,
    **PLAIN,
    **ROUTED,
}
