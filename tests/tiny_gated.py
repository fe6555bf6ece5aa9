"""Tiny configurations of architectures with RMSNorm and a gate that differ from Llama in order or in data."""

from typing import Any

from tests.tiny_base import Config, base_config


def _gemma(**options: Any) -> Config:
    own = {"attention_bias": False, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
    return base_config("gemma", "GemmaForCausalLM", **own | options)


def _gemma2(model_type: str = "gemma2", class_name: str = "Gemma2ForCausalLM", **options: Any) -> Config:
    layers = options.get("num_hidden_layers", 3)
    own = {
        "attention_bias": False,
        "attn_logit_softcapping": 0.8,
        "final_logit_softcapping": 1.5,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"][
            :layers
        ],
        "num_hidden_layers": layers,
        "query_pre_attn_scalar": 8,
        "sliding_window": 12,
        "tie_word_embeddings": True,
    }
    config = base_config(model_type, class_name, **own | options)
    del config["hidden_act"]
    return config


def _gemma3(**options: Any) -> Config:
    kinds = {
        "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    own = {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_parameters": kinds,
        "use_bidirectional_attention": False,
    }
    return _gemma2("gemma3_text", "Gemma3ForCausalLM", **own | options)


def _phi3(**options: Any) -> Config:
    own = {"original_max_position_embeddings": 64, "pad_token_id": 3, "sliding_window": None}
    config = base_config("phi3", "Phi3ForCausalLM", **own | options)
    del config["head_dim"]
    return config


def _granite(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "mlp_bias": False,
        "residual_multiplier": 0.7,
    }
    return base_config("granite", "GraniteForCausalLM", **own | options)


def _smollm3(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "layer_types": ["full_attention"] * 4,
        "mlp_bias": False,
        "no_rope_layers": [1, 1, 0, 1],
        "num_hidden_layers": 4,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    return base_config("smollm3", "SmolLM3ForCausalLM", **own | options)


def _olmo2(**options: Any) -> Config:
    config = base_config("olmo2", "Olmo2ForCausalLM", **{"attention_bias": False} | options)
    del config["head_dim"]
    return config


def _olmo3(**options: Any) -> Config:
    own = {
        "attention_bias": False,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 128,
        "num_hidden_layers": 3,
        "rope_parameters": {
            "full_attention": {
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
                "rope_type": "yarn",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 12,
    }
    config = base_config("olmo3", "Olmo3ForCausalLM", **own | options)
    del config["head_dim"]
    return config


def _glm4(**options: Any) -> Config:
    own = {
        "attention_bias": True,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
    }
    return base_config("glm4", "Glm4ForCausalLM", **own | options)


def _exaone4(**options: Any) -> Config:
    own = {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 12,
        "sliding_window_pattern": 2,
    }
    return base_config("exaone4", "Exaone4ForCausalLM", **own | options)


def _ministral(**options: Any) -> Config:
    own = {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "sliding_window": 10,
    }
    return base_config("ministral", "MinistralForCausalLM", **own | options)


def _gemma3_as_version_4(config: Config) -> Config:
    """The same, with the keys of Gemma 3's first configurations."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    rope = {"rope_theta": 50000.0, "rope_local_base_freq": 1000.0}
    return old | rope | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}


GATED: dict[str, Config] = {
    # ministral: windows in the layers that are named
    "ministral_window_layers": _ministral(),
    # gemma: gains of 1 + w, a scaled embedding, heads wider than the model
    "gemma_mqa_head_dim": _gemma(hidden_size=40, head_dim=24, num_key_value_heads=1, intermediate_size=172),
    "gemma_biases_gelu": _gemma(attention_bias=True, hidden_act="gelu", tie_word_embeddings=False),
    # gemma2: norms around, both caps, windows in every other layer; and with none of these defaults
    "gemma2_caps": _gemma2(),
    "gemma2_biases_no_caps_odd_sizes": _gemma2(
        attention_bias=True,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        hidden_size=40,
        head_dim=24,
        intermediate_size=172,
        query_pre_attn_scalar=40,
        vocab_size=99,
    ),
    # gemma3: two rotary bases, one of them scaled; norms of q and k; a cap where it is set
    "gemma3_local_global": _gemma3(),
    "gemma3_scaled_cap_v4": _gemma3_as_version_4(
        _gemma3(
            final_logit_softcapping=1.5,
            hidden_size=40,
            head_dim=24,
            num_hidden_layers=4,
            sliding_window_pattern=3,
        )
    ),
    # phi3: fused matrices; a part of each head rotated; LongRoPE within its first context
    "phi3_gqa_window": _phi3(sliding_window=10),
    "phi3_partial_longrope": _phi3(
        max_position_embeddings=256,
        rope_parameters={
            "long_factor": [1.5, 2.0, 4.0, 8.0, 16.0, 32.0],
            "partial_rotary_factor": 0.75,
            "rope_theta": 10000.0,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0],
        },
    ),
    # smollm3: layers without rope, windows, biases
    "smollm3_no_rope_layers": _smollm3(rope_parameters={"rope_theta": 50000.0, "rope_type": "default"}),
    "smollm3_biases": _smollm3(
        attention_bias=True,
        mlp_bias=True,
        layer_types=["full_attention"] * 2,
        no_rope_layers=[1] * 2,
        num_hidden_layers=2,
    ),
    "smollm3_windows": _smollm3(
        hidden_size=48,
        head_dim=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        sliding_window=10,
        use_sliding_window=True,
    ),
    # granite: every multiplier, with the embedding shared and not
    "granite_tied_biases": _granite(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "granite_untied_head_dim": _granite(hidden_size=48, head_dim=12),
    # olmo2: norms behind, and over all heads
    "olmo2_gqa": _olmo2(),
    "olmo2_biases_odd_sizes": _olmo2(
        attention_bias=True,
        hidden_size=40,
        num_attention_heads=5,
        num_key_value_heads=5,
        intermediate_size=172,
    ),
    # olmo3: windows in some layers, rope stretched in the others
    "olmo3_hybrid_yarn": _olmo3(),
    # glm4: norms around, fused gate and up, neighbours rotated, in half or a quarter of a head
    "glm4_gqa": _glm4(),
    "glm4_quarter_tied": _glm4(
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"partial_rotary_factor": 0.25, "rope_theta": 100.0, "rope_type": "default"},
    ),
    # exaone4: norms behind, rope only where a window is
    "exaone4_hybrid": _exaone4(),
    "exaone4_no_window": _exaone4(
        layer_types=["full_attention"] * 3, sliding_window=None, hidden_size=40, head_dim=24, vocab_size=99
    ),
}
