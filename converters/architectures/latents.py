"""What the architectures with latent attention share: their tensors, and the scale of their scores."""

import math
from collections.abc import Mapping
from typing import Final

from edgert.config import ModelSpec
from edgert.converters.architectures.cuts import Cut, Layout, PerHead
from edgert.converters.architectures.family import Experts, Latents, rope_parameters
from edgert.converters.architectures.windows import layer_count
from edgert.converters.hf_config import HfConfig
from edgert.converters.rope import yarn_scale
from edgert.converters.safetensors_source import SourceTensor
from edgert.errors import UnsupportedError

NAMES: Final = {
    "q_down": "self_attn.q_a_proj.weight",
    "q_down_bias": "self_attn.q_a_proj.bias",
    "q_down_norm": "self_attn.q_a_layernorm.weight",
    "q_plain": "self_attn.q_plain.weight",
    "q_rope": "self_attn.q_rope.weight",
    "kv_down": "self_attn.kv_down.weight",
    "kv_down_bias": "self_attn.kv_down.bias",
    "kv_down_norm": "self_attn.kv_a_layernorm.weight",
    "k_rope": "self_attn.k_rope.weight",
    "k_rope_bias": "self_attn.k_rope.bias",
    "k_up": "self_attn.k_up.weight",
    "v_up": "self_attn.v_up.weight",
    "choice_bias": "mlp.gate.e_score_correction_bias",
    "shared_gate": "mlp.shared_experts.gate_proj.weight",
    "shared_up": "mlp.shared_experts.up_proj.weight",
    "shared_down": "mlp.shared_experts.down_proj.weight",
}
UP: Final = "self_attn.kv_b_proj.weight"
"""[H * (n + v), R]: of every head what makes its keys of the latent, then what makes its values."""


def latents(config: HfConfig) -> Latents:
    """The sizes of latent attention; refused where they are no whole blocks of ours."""
    heads = config.integer("num_attention_heads")
    config.refuse_unless("num_key_value_heads", heads)
    for key, unit in (
        ("kv_lora_rank", 32),
        ("qk_nope_head_dim", 32),
        ("v_head_dim", 16),
        ("qk_rope_head_dim", 16),
    ):
        if config.integer(key, most=1 << 16) % unit:
            raise UnsupportedError(
                f"{config.where}: found {key} {config.integer(key)}, expected a multiple of {unit}; "
                "convert another model"
            )
    return Latents(
        width=config.integer("kv_lora_rank"),
        query_width=config.integer("q_lora_rank") if config.has("q_lora_rank") else 0,
        plain=config.integer("qk_nope_head_dim"),
        rotary=config.integer("qk_rope_head_dim"),
        value=config.integer("v_head_dim"),
    )


def layout(config: HfConfig, neighbours: bool) -> Layout:
    """Where a checkpoint has these tensors; `neighbours`: its rotary pairs are."""
    sizes, heads = latents(config), config.integer("num_attention_heads")
    queries = PerHead(heads, {"q_plain": sizes.plain, "q_rope": sizes.rotary}, "q_rope" if neighbours else "")
    down = {
        f"self_attn.kv_a_proj_with_mqa.{kind}": PerHead(
            1,
            {f"kv_down{suffix}": sizes.width, f"k_rope{suffix}": sizes.rotary},
            f"k_rope{suffix}" if neighbours else "",
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    }
    cuts: dict[str, Cut] = {f"self_attn.{'q_b' if sizes.query_width else 'q'}_proj.weight": queries, **down}
    layers = layer_count(config)
    more = config.integer("num_nextn_predict_layers", 0, least=0, most=layers)
    return Layout(
        names=NAMES,
        cuts=cuts,
        expanded=expanded,
        foreign=tuple(f"model.layers.{layers + i}." for i in range(more)),  # guess further tokens
    )


def expanded(tensors: Mapping[str, SourceTensor], spec: ModelSpec) -> Mapping[str, SourceTensor]:
    """The tensors with what makes keys, turned around for each head, and what makes values by themselves."""
    found = dict(tensors)
    both = PerHead(spec.heads, {"k_up": spec.plain_dim, "v_up": spec.value_dim})
    for layer in range(spec.layers):
        name = f"model.layers.{layer}.{UP}"
        tensor = found.get(name)
        if tensor is not None and tensor.readable and tensor.shape == (both.total, spec.latent):
            del found[name]
            rows = both.parts()
            before = name.removesuffix(UP)
            found[before + NAMES["k_up"]] = tensor.pick(rows["k_up"]).turn(spec.heads)
            found[before + NAMES["v_up"]] = tensor.pick(rows["v_up"])
    return found


def factors(config: HfConfig) -> dict[str, float]:
    """The scale of the scores, where ours is that of the wide head, and of the experts' sum."""
    sizes, rope = latents(config), rope_parameters(config)
    scale = math.sqrt((sizes.rotary + sizes.width) / (sizes.rotary + sizes.plain))
    if rope.text("rope_type", "default") != "default" and rope.values.get("mscale_all_dim"):
        scale *= yarn_scale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2
    return {
        "q_plain": scale,
        "q_rope": scale,
        "experts.down": config.number("routed_scaling_factor", 1.0),
    }


def experts(config: HfConfig, normalized: bool) -> Experts:
    """The experts of a DeepSeek model, whose first layers have none."""
    config.refuse_unless("moe_layer_freq", 1)
    layers = layer_count(config)
    width = config.integer("moe_intermediate_size")
    return Experts(
        count=config.integer("n_routed_experts"),
        active=config.integer("num_experts_per_tok"),
        width=width,
        normalized=normalized,
        shared_width=width * config.integer("n_shared_experts"),
        dense_layers=tuple(range(config.integer("first_k_dense_replace", least=0, most=layers - 1))),
    )
