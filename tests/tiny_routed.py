"""Tiny configurations of gpt-oss and of DeepSeek's models, and the shapes of their tensors."""

from collections.abc import Mapping
from typing import Any

from tests.tiny_base import Config, base_config

Shapes = dict[str, tuple[int, ...]]

FULL, SLIDING = "full_attention", "sliding_attention"


def _gpt_oss(**options: Any) -> Config:
    own = {
        "attention_bias": True,
        "intermediate_size": 48,
        "layer_types": [SLIDING, FULL, SLIDING],
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "num_local_experts": 6,
        "sliding_window": 8,
        "swiglu_alpha": 1.3,
        "swiglu_limit": 0.8,
    }
    return base_config("gpt_oss", "GptOssForCausalLM", **own | options)


def _deepseek(version: int, **options: Any) -> Config:
    own = {
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "kv_lora_rank": 32,
        "moe_intermediate_size": 40,
        "n_group": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 2.5,
        "topk_group": 2,
        "v_head_dim": 16,
    }
    own |= {"topk_method": "group_limited_greedy"} if version == 2 else {"norm_topk_prob": True}
    return base_config(f"deepseek_v{version}", f"DeepseekV{version}ForCausalLM", **own | options)


def _yarn(**more: Any) -> Config:
    rope = {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
    }
    return {"max_position_embeddings": 128, "rope_parameters": rope | more}


ROUTED: dict[str, Config] = {
    # gpt_oss: a sink for each head; a clamped gate; biases everywhere, or in the experts alone
    "gpt_oss_yarn": _gpt_oss(**_yarn(truncate=False, beta_fast=2.0, beta_slow=0.5)),
    "gpt_oss_no_biases_odd_sizes": _gpt_oss(
        attention_bias=False,
        head_dim=24,
        hidden_size=40,
        intermediate_size=44,
        layer_types=[FULL, SLIDING],
        num_experts_per_tok=3,
        num_hidden_layers=2,
        num_local_experts=5,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        tie_word_embeddings=True,
        vocab_size=101,
    ),
    # deepseek_v2: a latent for queries or none; the best of all experts or of some groups; YaRN's two scales
    "deepseek_v2_lite": _deepseek(
        2,
        **_yarn(mscale=2.0, mscale_all_dim=0.7),
        n_group=1,
        n_shared_experts=2,
        q_lora_rank=None,
        routed_scaling_factor=1.0,
        topk_group=1,
        topk_method="greedy",
    ),
    "deepseek_v2_groups_biases": _deepseek(
        2,
        attention_bias=True,
        hidden_size=40,
        intermediate_size=88,
        qk_nope_head_dim=64,
        rms_norm_eps=0.02,
        routed_scaling_factor=4.0,
        v_head_dim=48,
        vocab_size=99,
    ),
    # deepseek_v3: scores chosen with a bias, normalised or not; rotary pairs that are neighbours or not
    "deepseek_v3_yarn": _deepseek(3, **_yarn(mscale=1.0, mscale_all_dim=1.0), routed_scaling_factor=1.5),
    "deepseek_v3_biases_tied": _deepseek(
        3,
        attention_bias=True,
        first_k_dense_replace=0,
        kv_lora_rank=64,
        n_group=1,
        n_routed_experts=6,
        norm_topk_prob=False,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        q_lora_rank=None,
        rope_interleave=False,
        routed_scaling_factor=1.0,
        tie_word_embeddings=True,
        topk_group=1,
    ),
}


def gpt_oss_experts(config: Mapping[str, Any]) -> Shapes:
    """The tensors of one layer's experts as transformers stores them, and the sinks of its heads."""
    count, width, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    return {
        "self_attn.sinks": (config["num_attention_heads"],),
        "mlp.router.weight": (count, width),
        "mlp.router.bias": (count,),
        "mlp.experts.gate_up_proj": (count, width, 2 * inner),
        "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
        "mlp.experts.down_proj": (count, inner, width),
        "mlp.experts.down_proj_bias": (count, width),
    }


def deepseek_attention(config: Mapping[str, Any]) -> Shapes:
    """The tensors of one layer's latent attention."""
    width, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    found: Shapes = {
        "self_attn.kv_a_proj_with_mqa.weight": (rank + rotary, width),
        "self_attn.kv_a_layernorm.weight": (rank,),
        "self_attn.kv_b_proj.weight": (heads * (plain + value), rank),
        "self_attn.o_proj.weight": (width, heads * value),
    }
    if config["q_lora_rank"] is None:
        found["self_attn.q_proj.weight"] = (heads * (plain + rotary), width)
    else:
        found["self_attn.q_a_proj.weight"] = (config["q_lora_rank"], width)
        found["self_attn.q_a_layernorm.weight"] = (config["q_lora_rank"],)
        found["self_attn.q_b_proj.weight"] = (heads * (plain + rotary), config["q_lora_rank"])
    if config["attention_bias"]:
        biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
        names = [name for name in biased if f"self_attn.{name}.weight" in found]
        found |= {f"self_attn.{name}.bias": found[f"self_attn.{name}.weight"][:1] for name in names}
    return found


def deepseek_shared(config: Mapping[str, Any]) -> Shapes:
    """What a layer's experts have beside their own matrices."""
    width = config["hidden_size"]
    shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    found: Shapes = {
        "mlp.shared_experts.gate_proj.weight": (shared, width),
        "mlp.shared_experts.up_proj.weight": (shared, width),
        "mlp.shared_experts.down_proj.weight": (width, shared),
    }
    if config["model_type"] == "deepseek_v3":
        found["mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
    return found
