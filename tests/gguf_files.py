"""Hugging Face folders written as GGUF files, as llama.cpp's converter writes them.

For tests and `tools/check_gguf.py`; needs the `gguf` package, which the product does not.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests import gguf_others

Floats = NDArray[np.float32]

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
INTERLEAVED = ("llama", "mistral", "mixtral")
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def export(folder: Path, out: Path, kind: str = "F32", parts: int = 0) -> None:
    """Write a folder as GGUF: matrices in `kind`, or F32 where their rows do not fill its blocks.

    With `parts` > 0 the file is split into parts of so many tensors each, named after `out`.
    """
    config = json.loads((folder / "config.json").read_text())
    other = gguf_others.NAMES.get(config["model_type"])
    architecture = other or ARCHITECTURES.get(config["model_type"], config["model_type"])
    split = {"split_max_tensors": parts, "small_first_shard": False} if parts else {}
    writer = gguf.GGUFWriter(out, architecture, **split)
    if other:
        gguf_others.write_keys(writer, config)
    else:
        _write_keys(writer, config)
    write_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()), size=config["vocab_size"])
    stored = {name: v for path in folder.glob("*.safetensors") for name, v in load_file(path).items()}
    for name, values in gguf_others.tensors(stored, config) if other else _tensors(stored, config):
        plain = values.ndim == 1 or "gate_inp" in name or name.endswith(".bias")
        # In gpt-oss it is for experts: llama.cpp takes no row of an embedding from it.
        plain |= other == "gpt-oss" and kind == "MXFP4" and "_exps" not in name
        put(writer, name, values, "F32" if plain else kind)
    finish(writer)


def put(writer: gguf.GGUFWriter, name: str, values: Floats, kind: str = "F32") -> None:
    """Add a tensor in a type."""
    number = gguf.GGMLQuantizationType[kind]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[number][0]:
        number = gguf.GGMLQuantizationType.F32
    data = gguf.quants.quantize(values, number)
    writer.add_tensor(name, data, raw_dtype=number)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(values: Floats, head_dim: int) -> Floats:
    """Rows of q or k in llama.cpp's order for llama: the two of a rotary pair side by side."""
    heads = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def _write_keys(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = _rope(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config["model_type"] in INTERLEAVED and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    experts = config.get("num_experts", config.get("num_local_experts"))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return {"rope_theta": config.get("rope_theta", 10000.0)} | rope


def _tensors(found: dict[str, Floats], config: dict[str, Any]) -> Iterator[tuple[str, Floats]]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, head_dim)
    experts: dict[str, dict[int, Floats]] = {}
    for source, stored in found.items():
        values = stored.astype(np.float32)
        if config["model_type"] in INTERLEAVED and ("q_proj" in source or "k_proj" in source):
            values = interleaved(values, head_dim)
        if ".experts." in source:
            _, _, layer, _, _, number, part, _ = source.split(".")
            experts.setdefault(f"blk.{layer}.{EXPERTS[part]}.weight", {})[int(number)] = values
        else:
            yield gguf_name(source), values[0] if "shared_expert_gate" in source else values
    for name, parts in experts.items():
        yield name, np.stack([parts[i] for i in range(len(parts))])


def gguf_name(source: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, kind = source.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{TOP[stem]}.{kind}"
    index, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{LAYER[part]}.{kind}"


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Floats:
    """What each frequency is divided by, written anew from the rule's definition."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(waves < original / high, 1, np.where(waves > original / low, factor, between))
    return factors.astype(np.float32)


def write_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: dict[str, Any], pre: str = "gpt-2", size: int = 0
) -> None:
    """A tokenizer.json as metadata: byte-level BPE, or a SentencePiece model with its scores.

    It is filled up to `size` tokens, for llama.cpp wants as many as the embedding has rows.
    """
    model, added = tokenizer["model"], {t["id"]: t for t in tokenizer["added_tokens"]}
    ids = {i: token for token, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(max(size, max(ids) + 1))]
    kinds = [_kind(i, ids, added, model.get("unk_token")) for i in range(len(tokens))]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model.get("merges", [])]
    is_byte_level = '"ByteLevel"' in json.dumps(tokenizer["decoder"])
    writer.add_tokenizer_model("gpt2" if is_byte_level else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if is_byte_level:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
    else:
        ranks = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
        last = len(ranks)
        writer.add_token_scores([-float(ranks.get(token, last + i)) for i, token in enumerate(tokens)])
    template = json.dumps(tokenizer["post_processor"])
    writer.add_add_bos_token("<s>" in template)
    for name, add in (("<s>", writer.add_bos_token_id), ("</s>", writer.add_eos_token_id)):
        if name in tokens:
            add(tokens.index(name))


def _kind(i: int, ids: dict[int, str], added: dict[int, dict[str, Any]], unknown: str | None) -> int:
    if i not in ids:
        return gguf.TokenType.UNUSED
    if ids[i] == unknown:
        return gguf.TokenType.UNKNOWN
    if i in added:
        return gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
    if len(ids[i]) == 6 and ids[i].startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL
