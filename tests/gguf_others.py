"""What llama.cpp's converter writes for architectures that differ from Llama's: keys, and changed tensors.

For `tests/gguf_files.py`. Names of tensors are those of the `gguf` package's own map.
"""

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Config = dict[str, Any]

NAMES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "granite": "granite",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "glm4": "glm4",
    "exaone4": "exaone4",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
"""By model_type: llama.cpp's name."""
SLIDING, FULL = "sliding_attention", "full_attention"
YARN: Config = {
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "rope_type": "yarn",
}
CASES: dict[str, Config] = {
    "gemma_mqa_head_dim": {},
    "gemma2_caps": {"query_pre_attn_scalar": 16},
    "gemma3_local_global": {
        "layer_types": [SLIDING] * 5 + [FULL],
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,
    },
    "phi3_gqa_window": {"sliding_window": None},
    "phi3_partial_longrope": {"max_position_embeddings": 1024, "original_max_position_embeddings": 256},
    "granite_untied_head_dim": {},
    "smollm3_no_rope_layers": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2_gqa": {},
    "glm4_gqa": {},
    "glm4_quarter_tied": {},
    "exaone4_no_window": {"head_dim": 16, "hidden_size": 64},  # llama.cpp wants heads as wide as the model
    "starcoder2_biases_window": {"sliding_window": None},
    "stablelm_biases": {},
    "stablelm_parallel": {},
    "cohere_tied": {},
    "cohere2_hybrid": {"layer_types": [SLIDING] * 3 + [FULL], "num_hidden_layers": 4},
    "gpt2_defaults": {},
    "gpt_neox_parallel": {},
    "gpt_neox_in_turn": {"attention_bias": True},
    "gpt_neox_v4": {"tie_word_embeddings": False},
    "gpt_oss_yarn": {
        "layer_types": [SLIDING, FULL, SLIDING],
        "rope_parameters": YARN | {"rope_theta": 150000.0},
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    "deepseek_v2_lite": {
        "q_lora_rank": 24,  # llama.cpp takes models of 26 and 27 layers, and no others, for those without
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3_yarn": {"norm_topk_prob": True},
}
"""Tiny configurations with what GGUF cannot say, and llama.cpp takes for granted, set to that."""
LAYER_NORMS = ("starcoder2", "stablelm", "cohere", "cohere2", "gpt2", "gpt_neox")
REORDERED = ("granite", "smollm3")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def first(config: Config, *keys: str, default: Any = None) -> Any:
    """The value of the first key that is there."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def write_keys(writer: gguf.GGUFWriter, config: Config) -> None:
    """The keys of a config.json."""
    kind, width = config["model_type"], first(config, "hidden_size", "n_embd")
    heads = first(config, "num_attention_heads", "n_head")
    head_dim = config.get("head_dim") or width // heads
    writer.add_block_count(first(config, "num_hidden_layers", "n_layer"))
    writer.add_context_length(first(config, "max_position_embeddings", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(first(config, "intermediate_size", "n_inner", default=4 * width))
    writer.add_head_count(heads)
    writer.add_head_count_kv(
        1 if kind.startswith("deepseek") else first(config, "num_key_value_heads", default=heads)
    )
    writer.add_vocab_size(config["vocab_size"])
    eps = first(config, "rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", default=1e-5)
    if kind in LAYER_NORMS:
        writer.add_layer_norm_eps(eps)
    else:
        writer.add_layer_norm_rms_eps(eps)
    if kind.startswith("deepseek"):
        _write_latents(writer, config)
    elif kind != "gpt2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        _write_rope(writer, config, head_dim)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    _write_own(writer, config)


def _write_rope(writer: gguf.GGUFWriter, config: Config, head_dim: int) -> None:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = rope.get("full_attention", rope)
    share = rope.get("partial_rotary_factor", config.get("rotary_pct", 1.0))
    writer.add_rope_dimension_count(int(head_dim * share))
    theta = first(rope, "rope_theta") or first(config, "rope_theta", "rotary_emb_base", default=10000.0)
    writer.add_rope_freq_base(float(theta))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "longrope":
        original = config["original_max_position_embeddings"]
        factor = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))


def _write_latents(writer: gguf.GGUFWriter, config: Config) -> None:
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotary)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rotary)
    writer.add_value_length_mla(config["v_head_dim"])
    _write_rope(writer, config, rotary)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    sigmoid = config["model_type"] == "deepseek_v3"
    writer.add_expert_gating_func(
        gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
    )
    writer.add_expert_weights_norm(config.get("norm_topk_prob", False))
    if config["n_group"] > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def _write_own(writer: gguf.GGUFWriter, config: Config) -> None:
    kind = config["model_type"]
    if kind == "gpt_oss":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if kind == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if kind in ("cohere", "cohere2"):
        writer.add_logit_scale(config["logit_scale"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "use_parallel_residual" in config:
        writer.add_parallel_residual(config["use_parallel_residual"])


def tensors(found: dict[str, Floats], config: Config) -> Iterator[tuple[str, Floats]]:
    """Tensors under llama.cpp's names, changed as its converter changes them."""
    kind = config["model_type"]
    architecture = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == NAMES[kind])
    layers = first(config, "num_hidden_layers", "n_layer")
    names = gguf.get_tensor_name_map(architecture, layers)
    if kind == "phi3" and "short_factor" in (config.get("rope_parameters") or {}):
        for part in ("short", "long"):
            factors = np.array(config["rope_parameters"][f"{part}_factor"], np.float32)
            yield f"rope_factors_{part}.weight", factors
    for source, stored in _experts(found, config).items():
        if source.startswith("blk."):
            yield source, np.ascontiguousarray(stored)
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name, source
        yield name, np.ascontiguousarray(_changed(source, stored.astype(np.float32), config))


def _experts(found: dict[str, Floats], config: Config) -> dict[str, Floats]:
    """The tensors, with the experts of gpt-oss and DeepSeek, and its latents, under llama.cpp's names."""
    left: dict[str, Floats] = {}
    stacks: dict[str, list[Floats]] = {}
    for source, values in found.items():
        layer = f"blk.{source.split('.')[2]}" if ".layers." in source else ""
        part = source.rpartition(".experts.")[2] if ".experts." in source else ""
        if part.startswith("gate_up_proj"):
            both = values if part.endswith("_bias") else values.swapaxes(1, 2)
            kind = "bias" if part.endswith("_bias") else "weight"
            left[f"{layer}.ffn_gate_exps.{kind}"], left[f"{layer}.ffn_up_exps.{kind}"] = (
                both[:, ::2],
                both[:, 1::2],
            )
        elif part == "down_proj_bias":
            left[f"{layer}.ffn_down_exps.bias"] = values
        elif part == "down_proj":
            left[f"{layer}.ffn_down_exps.weight"] = values.swapaxes(1, 2)
        elif part:
            stacks.setdefault(
                f"{layer}.ffn_{part.split('.')[1].removesuffix('_proj')}_exps.weight", []
            ).append(values)
        elif source.endswith("kv_b_proj.weight"):
            heads, plain = config["num_attention_heads"], config["qk_nope_head_dim"]
            both = values.reshape(heads, -1, values.shape[1])
            left[f"{layer}.attn_k_b.weight"] = both[:, :plain].swapaxes(1, 2)
            left[f"{layer}.attn_v_b.weight"] = both[:, plain:]
        elif source.endswith("e_score_correction_bias"):
            left[f"{layer}.exp_probs_b.bias"] = values
        elif source.endswith(".sinks"):
            left[f"{layer}.attn_sinks.weight"] = values
        else:
            left[source] = values
    return left | {name: np.stack(parts) for name, parts in stacks.items()}


def _changed(source: str, values: Floats, config: Config) -> Floats:
    kind = config["model_type"]
    heads = first(config, "num_attention_heads", "n_head")
    if kind.startswith("gemma") and source.endswith("norm.weight"):
        return values + np.float32(1)
    if kind in REORDERED and ("q_proj" in source or "k_proj" in source):
        d = config.get("head_dim") or config["hidden_size"] // heads
        pairs = values.reshape(-1, 2, d // 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    if kind == "gpt2" and source.endswith(TRANSPOSED):
        return values.T
    if kind == "gpt_neox" and "query_key_value" in source:
        parts = values.reshape(heads, 3, -1, *values.shape[1:])
        return np.concatenate([parts[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])
    return values
