"""What tiny configurations are made of."""

from typing import Any

Config = dict[str, Any]


def base_config(model_type: str, class_name: str, **options: Any) -> Config:
    """The keys that all architectures share, in the style transformers 5 writes them."""
    shared: Config = {
        "architectures": [class_name],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": 128,
    }
    return shared | options


def without(config: Config, *keys: str) -> Config:
    """A configuration without some keys."""
    return {key: value for key, value in config.items() if key not in keys}
