"""The tensors of a model as checkpoints on the hub name them, from its `config.json`."""

from collections.abc import Mapping
from typing import Any

from tests.tiny_routed import Shapes, deepseek_attention, deepseek_shared, gpt_oss_experts

_AROUND_ATTENTION = ("input_layernorm", "post_attention_layernorm")
_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
_NORMS = {
    "gemma2": (*_AROUND_ATTENTION, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": (*_AROUND_ATTENTION, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "glm4": (*_AROUND_ATTENTION, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "olmo2": _BEHIND,
    "exaone4": _BEHIND,
    "cohere": ("input_layernorm",),
    "cohere2": ("input_layernorm",),
    "olmo3": _BEHIND,
}


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of the model under its Hugging Face name."""
    kind = config["model_type"]
    if kind in _OTHERS:
        return _OTHERS[kind](config)
    width = config["hidden_size"]
    found: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer, routed = f"model.layers.{i}.", has_experts(config, i)
        parts = _attention(config) | ({} if routed else _feed_forward(config))
        norms = _NORMS.get(kind, _AROUND_ATTENTION)
        for name in norms[:1] if config.get("use_parallel_residual") else norms:
            parts |= norm(name, width, kind in ("stablelm", "starcoder2"))
        parts |= (expert_shapes(config) if routed else {}) | _head_norms(config)
        found |= {layer + part: shape for part, shape in parts.items()}
    found |= norm("model.norm", width, kind in ("stablelm", "starcoder2"))
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], width)
    return found


def norm(name: str, width: int, bias: bool) -> Shapes:
    """The gains of a norm, and its bias."""
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    """A matrix, and its bias."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _attention(config: Mapping[str, Any]) -> Shapes:
    width, heads, kind = config["hidden_size"], config["num_attention_heads"], config["model_type"]
    if kind.startswith("deepseek"):
        return deepseek_attention(config)
    d = config.get("head_dim", width // heads)
    q, kv = heads * d, config["num_key_value_heads"] * d
    bias = config.get("attention_bias", config.get("use_bias", False))
    qkv_bias = kind == "qwen2" or bias or config.get("qkv_bias", config.get("use_qkv_bias", False))
    if kind == "phi3":
        found = linear("self_attn.qkv_proj", q + 2 * kv, width, False)
    else:
        found = linear("self_attn.q_proj", q, width, qkv_bias)
        found |= linear("self_attn.k_proj", kv, width, qkv_bias)
        found |= linear("self_attn.v_proj", kv, width, qkv_bias)
    return found | linear("self_attn.o_proj", width, q, bias and kind != "glm4")


def _head_norms(config: Mapping[str, Any]) -> Shapes:
    kind, heads = config["model_type"], config["num_attention_heads"]
    d = config.get("head_dim", config["hidden_size"] // heads)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text", "exaone4"):
        return {f"self_attn.{name}.weight": (d,) for name in ("q_norm", "k_norm")}
    if kind in ("olmoe", "olmo2", "olmo3"):
        sizes = {"q_norm": heads * d, "k_norm": config["num_key_value_heads"] * d}
        return {f"self_attn.{name}.weight": (size,) for name, size in sizes.items()}
    return {}


def _feed_forward(config: Mapping[str, Any]) -> Shapes:
    width, ffn, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    bias = config.get("mlp_bias", config.get("use_bias", False))
    if kind == "starcoder2":
        return linear("mlp.c_fc", ffn, width, bias) | linear("mlp.c_proj", width, ffn, bias)
    if kind in ("phi3", "glm4"):
        found = linear("mlp.gate_up_proj", 2 * ffn, width, False)
    else:
        found = linear("mlp.gate_proj", ffn, width, bias) | linear("mlp.up_proj", ffn, width, bias)
    return found | linear("mlp.down_proj", width, ffn, bias)


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer routes its tokens."""
    if "n_routed_experts" in config:
        return layer >= int(config["first_k_dense_replace"])
    if config.get("num_experts", config.get("num_local_experts")) is None:
        return False
    return layer not in config.get("mlp_only_layers", ()) and not (layer + 1) % config.get(
        "decoder_sparse_step", 1
    )


def expert_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's experts, as checkpoints on the hub name them."""
    width, kind = config["hidden_size"], config["model_type"]
    if kind == "gpt_oss":
        return gpt_oss_experts(config)
    count = config.get("num_experts", config.get("num_local_experts", config.get("n_routed_experts")))
    ffn = config.get("moe_intermediate_size", config["intermediate_size"])
    if kind == "granitemoe":
        return {
            "block_sparse_moe.router.layer.weight": (count, width),
            "block_sparse_moe.input_linear.weight": (count, 2 * ffn, width),
            "block_sparse_moe.output_linear.weight": (count, width, ffn),
        }
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (count, width)}
    for expert in range(count):
        found[f"{block}.experts.{expert}.{gate}.weight"] = (ffn, width)
        found[f"{block}.experts.{expert}.{up}.weight"] = (ffn, width)
        found[f"{block}.experts.{expert}.{down}.weight"] = (width, ffn)
    if kind.startswith("deepseek"):
        found |= deepseek_shared(config)
    if "shared_expert_intermediate_size" in config:
        shared = config["shared_expert_intermediate_size"]
        found["mlp.shared_expert_gate.weight"] = (1, width)
        found["mlp.shared_expert.gate_proj.weight"] = (shared, width)
        found["mlp.shared_expert.up_proj.weight"] = (shared, width)
        found["mlp.shared_expert.down_proj.weight"] = (width, shared)
    return found


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    """Matrices are stored as [inputs, outputs]."""
    width, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    found: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], width),
        "transformer.wpe.weight": (config["n_positions"], width),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        found |= norm(f"{layer}.ln_1", width, True) | norm(f"{layer}.ln_2", width, True)
        for name, rows, columns in (
            ("attn.c_attn", 3 * width, width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", inner, width),
            ("mlp.c_proj", width, inner),
        ):
            found[f"{layer}.{name}.weight"] = (columns, rows)
            found[f"{layer}.{name}.bias"] = (rows,)
    return found | norm("transformer.ln_f", width, True)


def _gpt_neox(config: Mapping[str, Any]) -> Shapes:
    width, inner, bias = config["hidden_size"], config["intermediate_size"], config["attention_bias"]
    vocab = config["vocab_size"]
    found: Shapes = {"gpt_neox.embed_in.weight": (vocab, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            found |= norm(f"{layer}.{name}", width, True)
        found |= linear(f"{layer}.attention.query_key_value", 3 * width, width, bias)
        found |= linear(f"{layer}.attention.dense", width, width, bias)
        found |= linear(f"{layer}.mlp.dense_h_to_4h", inner, width, True)
        found |= linear(f"{layer}.mlp.dense_4h_to_h", width, inner, True)
    found |= norm("gpt_neox.final_layer_norm", width, True)
    return found | ({} if config["tie_word_embeddings"] else {"embed_out.weight": (vocab, width)})


def _opt(config: Mapping[str, Any]) -> Shapes:
    """A table of positions has two rows that no token takes."""
    width, inner, decoder = config["hidden_size"], config["ffn_dim"], "model.decoder"
    found: Shapes = {
        f"{decoder}.embed_tokens.weight": (config["vocab_size"], width),
        f"{decoder}.embed_positions.weight": (config["max_position_embeddings"] + 2, width),
    }
    found |= norm(f"{decoder}.final_layer_norm", width, True)
    for i in range(config["num_hidden_layers"]):
        layer = f"{decoder}.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}.self_attn.{name}", width, width, True)
        found |= linear(f"{layer}.fc1", inner, width, True) | linear(f"{layer}.fc2", width, inner, True)
        found |= norm(f"{layer}.self_attn_layer_norm", width, True)
        found |= norm(f"{layer}.final_layer_norm", width, True)
    return found


def _falcon(config: Mapping[str, Any]) -> Shapes:
    width, heads, bias = config["hidden_size"], config["num_attention_heads"], config["bias"]
    grouped, inner = config["new_decoder_architecture"], config["ffn_hidden_size"]
    kv_heads = config["num_kv_heads"] if grouped else 1 if config["multi_query"] else heads
    norms = (
        ["input_layernorm"] if config["parallel_attn"] else ["input_layernorm", "post_attention_layernorm"]
    )
    if grouped and config["num_ln_in_parallel_attn"] != 1:
        norms = ["ln_attn", "ln_mlp"]
    found: Shapes = {"transformer.word_embeddings.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        for name in norms:
            found |= norm(f"{layer}.{name}", width, True)
        rows = (heads + 2 * kv_heads) * (width // heads)
        found |= linear(f"{layer}.self_attention.query_key_value", rows, width, bias)
        found |= linear(f"{layer}.self_attention.dense", width, width, bias)
        found |= linear(f"{layer}.mlp.dense_h_to_4h", inner, width, bias)
        found |= linear(f"{layer}.mlp.dense_4h_to_h", width, inner, bias)
    found |= norm("transformer.ln_f", width, True)
    return found | (
        {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], width)}
    )


_OTHERS = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "opt": _opt, "falcon": _falcon}
