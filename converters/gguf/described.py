"""Architectures whose keys in a GGUF file say what their config.json said, and are read as that.

So what a Hugging Face model_type means is in one place (converters/architectures), multipliers, caps and
positions included; here is only how llama.cpp writes it down. Where its converter has already computed
something (Gemma's gains hold their 1), it is not done again.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from edgert.config import GLOBAL_ROPE
from edgert.converters.architectures import Decoder, describe
from edgert.converters.architectures.cuts import Cut, Layout, PerHead, Stacked
from edgert.converters.gguf.architectures import LAYERS, NAMES, REFUSED, gguf_name
from edgert.converters.gguf.keys import (
    bos_id,
    divided,
    embedding,
    has,
    head_dim,
    layer_count,
    own_keys,
    rope_parameters,
    uniform,
    vocab,
)
from edgert.converters.gguf.reader import GgufFile
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import ConversionError, UnsupportedError
from edgert.format.tensors import rope_name

GLOBAL: Final = rope_name(GLOBAL_ROPE)
SHORT_FACTORS: Final = "rope_factors_short.weight"
LONG_FACTORS: Final = "rope_factors_long.weight"

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Described:
    """What llama.cpp's name of an architecture stands for."""

    model_type: str
    config: Callable[[HfConfig, GgufFile], Values] = lambda keys, file: {}  # further keys of config.json
    cuts: Callable[[Values], Mapping[str, Cut]] = lambda values: {}
    names: Mapping[str, str] = field(default_factory=dict)  # of tensors, where they differ from others'
    interleaved: bool = False  # rotary pairs are neighbours
    partial: bool = False  # rope.dimension_count may be less than a head
    understood: frozenset[str] = field(default_factory=frozenset)  # keys of REFUSED that config reads


def read_described(file: GgufFile, name: str, eos_ids: Iterable[int]) -> Decoder:
    """The decoder of a GGUF file of one of DESCRIBED; raises as `config.read_decoder`."""
    known, keys = DESCRIBED[name], own_keys(file, name)
    for key, neutral in REFUSED.items():
        if key not in known.understood:
            keys.refuse_unless(key, *neutral)
    values = _common(keys, file, known) | known.config(keys, file)
    window = keys.integer("attention.sliding_window", 0, least=0)
    if "sliding_window" not in values and 0 < window < keys.integer("context_length"):
        raise UnsupportedError(
            f"{keys.where}: found attention.sliding_window {window}, expected none, for the file does not "
            "say which layers have it; convert the Hugging Face folder"
        )
    values |= {"eos_token_id": list(eos_ids), "bos_token_id": bos_id(file)}
    decoder = describe(HfConfig(values, keys.where), HfConfig({}, keys.where))
    layout = Layout(
        names={**NAMES, **known.names},
        layers=LAYERS,
        cuts=known.cuts(values),
        interleaved=known.interleaved,
        ignored=(SHORT_FACTORS, LONG_FACTORS) if known.model_type == "phi3" else (),
    )
    variant = replace(decoder.variant, layout=layout, one_more=frozenset())
    frequencies = {GLOBAL: divided(decoder.computed[GLOBAL], file)}
    return replace(decoder, variant=variant, computed={**decoder.computed, **frequencies})


def _common(keys: HfConfig, file: GgufFile, known: Described) -> Values:
    """What every decoder has, under Llama's names and those of LayerNorm's models."""
    width, heads = keys.integer("embedding_length"), uniform(keys, "attention.head_count")
    latent = known.model_type.startswith("deepseek")  # whose heads are no even part of the width
    d = 1 if latent else head_dim(keys, max(1, width // heads), partial=known.partial)
    context = keys.integer("context_length")
    rope = dict(rope_parameters(keys, context).values)
    rotary = keys.integer("rope.dimension_count", d)
    if known.partial:  # the half makes a whole number of what is rounded down
        rope["partial_rotary_factor"] = min(1.0, (rotary + 0.5) / d)
    values: Values = {
        "model_type": known.model_type,
        "hidden_size": width,
        "num_hidden_layers": layer_count(keys, file),
        "num_attention_heads": heads,
        "num_key_value_heads": uniform(keys, "attention.head_count_kv", heads),
        "head_dim": d,
        "intermediate_size": uniform(keys, "feed_forward_length"),
        "vocab_size": vocab(file),
        "max_position_embeddings": context,
        "tie_word_embeddings": gguf_name("output") not in file.tensors,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
    }
    if embedding(file).shape[1:] != (width,):
        raise ConversionError(
            f"{file.path}: found token_embd.weight of shape {list(embedding(file).shape)}, expected rows of "
            f"{width}; download the file again"
        )
    for key, names in (
        ("attention.layer_norm_rms_epsilon", ("rms_norm_eps",)),
        ("attention.layer_norm_epsilon", ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon")),
    ):
        if keys.has(key):
            values |= dict.fromkeys(names, keys.number(key))
    return values


def _some(keys: HfConfig, **names: str) -> Values:
    """Keys of config.json by ours, those the file has."""
    return {name: keys.values[key] for name, key in names.items() if keys.has(key)}


def _gemma2(keys: HfConfig, file: GgufFile) -> Values:
    caps = _some(
        keys,
        attn_logit_softcapping="attn_logit_softcapping",
        final_logit_softcapping="final_logit_softcapping",
        sliding_window="attention.sliding_window",
    )
    return caps | {"query_pre_attn_scalar": _score_scalar(keys, largest=46)}


def _score_scalar(keys: HfConfig, largest: int) -> int:
    """It is not in the file: the size of a head, but width / heads in the models of so many layers."""
    width, heads = keys.integer("embedding_length"), uniform(keys, "attention.head_count")
    if keys.integer("block_count") == largest:
        return max(1, width // heads)
    return head_dim(keys, max(1, width // heads))


def _gemma3(keys: HfConfig, file: GgufFile) -> Values:
    found = _some(
        keys,
        final_logit_softcapping="final_logit_softcapping",
        sliding_window="attention.sliding_window",
        rope_local_base_freq="rope.freq_base_swa",
    )
    scaling = dict(rope_parameters(keys, keys.integer("context_length")).values)
    rope = {
        "rope_parameters": None,
        "rope_theta": scaling.pop("rope_theta", 1000000.0),
        "rope_scaling": scaling,
    }
    return rope | found | {"query_pre_attn_scalar": _score_scalar(keys, largest=62)}


def _phi3(keys: HfConfig, file: GgufFile) -> Values:
    found = _some(keys, sliding_window="attention.sliding_window")
    if SHORT_FACTORS not in file.tensors:
        return found
    d = head_dim(
        keys, max(1, keys.integer("embedding_length") // uniform(keys, "attention.head_count")), True
    )
    rotary = keys.integer("rope.dimension_count", d)
    factors = file.tensors[SHORT_FACTORS]
    if factors.shape != (rotary // 2,) or not factors.readable:
        raise ConversionError(
            f"{file.path}: found {SHORT_FACTORS} of shape {shown(list(factors.shape))}, expected "
            f"{rotary // 2} numbers; download the file again"
        )
    rope = {
        "rope_type": "longrope",
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": min(1.0, (rotary + 0.5) / d),
        "short_factor": [float(x) for x in factors.vector().astype(np.float64)],
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
    }
    return found | {"rope_parameters": rope}


def _granite(keys: HfConfig, file: GgufFile) -> Values:
    width, heads = keys.integer("embedding_length"), uniform(keys, "attention.head_count")
    usual = head_dim(keys, max(1, width // heads)) ** -0.5
    names = {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    found: Values = {name: keys.values.get(key) or 1.0 for name, key in names.items()}
    return found | {"attention_multiplier": keys.values.get("attention.scale") or usual}


def _stablelm(keys: HfConfig, file: GgufFile) -> Values:
    parallel = keys.flag("use_parallel_residual", not has(file, "ffn_norm"))
    return {"use_parallel_residual": parallel, "use_qkv_bias": has(file, "q_bias")}


def _gpt2(keys: HfConfig, file: GgufFile) -> Values:
    return {
        "n_embd": keys.integer("embedding_length"),
        "n_layer": layer_count(keys, file),
        "n_head": uniform(keys, "attention.head_count"),
        "n_inner": uniform(keys, "feed_forward_length"),
        "n_positions": keys.integer("context_length"),
        "head_dim": None,
    }


def _neox(keys: HfConfig, file: GgufFile) -> Values:
    bias = "blk.0.attn_qkv.bias" in file.tensors
    return {"use_parallel_residual": keys.flag("use_parallel_residual", True), "attention_bias": bias}


def _gpt_oss(keys: HfConfig, file: GgufFile) -> Values:
    """llama.cpp rounds the ends of YaRN's ramp, whatever the model was trained with: so it is done here."""
    return {
        "num_local_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "intermediate_size": keys.integer("expert_feed_forward_length"),
        "sliding_window": keys.integer("attention.sliding_window"),
        "attention_bias": has(file, "q_bias"),
    }


def _deepseek(keys: HfConfig, file: GgufFile) -> Values:
    """With `attention.key_length_mla`; a file from before it has one tensor for the two that we read."""
    heads, rotary = uniform(keys, "attention.head_count"), keys.integer("rope.dimension_count")
    keys.refuse_unless("attention.head_count_kv", 1)
    if not keys.has("attention.key_length_mla"):
        raise UnsupportedError(
            f"{keys.where}: found no attention.key_length_mla, expected it: the file is of 2024; "
            "make it anew with llama.cpp's converter, or convert the Hugging Face folder"
        )
    key = keys.integer("attention.key_length_mla", most=1 << 16)
    sigmoid = keys.integer("expert_gating_func", 1) == 2
    groups, width = keys.integer("expert_group_count", 1), keys.integer("expert_feed_forward_length")
    if not sigmoid and groups > 1:
        raise UnsupportedError(
            f"{keys.where}: found expert_group_count {groups} with a softmax, whose groups llama.cpp takes "
            "for others than the model does; convert the Hugging Face folder"
        )
    values: Values = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": heads,
        "head_dim": None,
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "q_lora_rank": keys.values.get("attention.q_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": max(1, key - rotary),
        "v_head_dim": keys.integer("attention.value_length_mla"),
        "n_routed_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "moe_intermediate_size": width,
        "n_shared_experts": keys.integer("expert_shared_count"),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0, least=0),
        "routed_scaling_factor": keys.values.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": keys.flag("expert_weights_norm"),
    }
    if sigmoid:
        values |= {"n_group": groups, "topk_group": keys.integer("expert_group_used_count", 1)}
    scaling = dict(rope_parameters(keys, keys.integer("context_length")).values)
    if scaling["rope_type"] == "yarn":
        # One number for both multipliers: cos and sin stay as they are, and scores take its square.
        multiplier = 10 * keys.number("rope.scaling.yarn_log_multiplier", 0.1)
        scaling |= {"mscale": multiplier, "mscale_all_dim": multiplier, "attention_factor": None}
    return values | {"rope_parameters": scaling}


def _latent_cuts(values: Values) -> Mapping[str, Cut]:
    rank, rotary = values["kv_lora_rank"], values["qk_rope_head_dim"]
    queries = {"q_plain": values["qk_nope_head_dim"], "q_rope": rotary}
    return {
        f"attn_{'q_b' if values['q_lora_rank'] else 'q'}.weight": PerHead(
            values["num_attention_heads"], queries, "q_rope"
        ),
        "attn_kv_a_mqa.weight": PerHead(1, {"kv_down": rank, "k_rope": rotary}, "k_rope"),
    }


def _qkv(values: Values) -> Mapping[str, Cut]:
    """q, k and v one after another in one tensor."""
    d = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    q, kv = values["num_attention_heads"] * d, values["num_key_value_heads"] * d
    return {
        "attn_qkv.weight": Stacked({"q": q, "k": kv, "v": kv}),
        "attn_qkv.bias": Stacked({"q_bias": q, "k_bias": kv, "v_bias": kv}),
    }


def _gate_up(values: Values) -> Mapping[str, Cut]:
    """Gate, then up, under the name of up."""
    inner = values["intermediate_size"]
    return {"ffn_up.weight": Stacked({"gate": inner, "up": inner})}


_GPT_OSS_NAMES: Final = {
    "ffn_norm": "post_attention_norm.weight",
    "sinks": "attn_sinks.weight",
    "router_bias": "ffn_gate_inp.bias",
    "experts_gate_bias": "ffn_gate_exps.bias",
    "experts_up_bias": "ffn_up_exps.bias",
    "experts_down_bias": "ffn_down_exps.bias",
}
_LATENT_NAMES: Final = {
    "q_down": "attn_q_a.weight",
    "q_down_norm": "attn_q_a_norm.weight",
    "q_plain": "attn_q.plain.weight",  # as cut
    "q_rope": "attn_q.rope.weight",
    "kv_down": "attn_kv.down.weight",
    "kv_down_norm": "attn_kv_a_norm.weight",
    "k_rope": "attn_k.rope.weight",
    "k_up": "attn_k_b.weight",
    "v_up": "attn_v_b.weight",
    "choice_bias": "exp_probs_b.bias",
}
_CAPS: Final = frozenset(("attn_logit_softcapping", "final_logit_softcapping"))
DESCRIBED: Final[dict[str, Described]] = {
    "gemma": Described("gemma"),
    "gemma2": Described("gemma2", _gemma2, understood=_CAPS),
    "gemma3": Described(
        "gemma3_text", _gemma3, understood=frozenset(("final_logit_softcapping", "rope.scale_linear"))
    ),
    "phi3": Described("phi3", _phi3, lambda values: {**_qkv(values), **_gate_up(values)}, partial=True),
    "granite": Described(
        "granite",
        _granite,
        interleaved=True,
        understood=frozenset(("attention.scale", "embedding_scale", "residual_scale", "logit_scale")),
    ),
    "smollm3": Described("smollm3", interleaved=True),
    "olmo2": Described("olmo2"),
    "glm4": Described(
        "glm4",
        lambda keys, file: {"attention_bias": has(file, "q_bias")},
        _gate_up,
        interleaved=True,
        partial=True,
    ),
    "exaone4": Described(
        "exaone4",
        # llama.cpp takes the window of its largest model for granted.
        lambda keys, file: {
            "sliding_window": keys.values.get("attention.sliding_window")
            or (4096 if keys.integer("block_count") == 64 else None)
        },
    ),
    "starcoder2": Described("starcoder2", lambda keys, file: {"use_bias": has(file, "q_bias")}),
    "stablelm": Described(
        "stablelm", _stablelm, partial=True, understood=frozenset({"use_parallel_residual"})
    ),
    "command-r": Described(
        "cohere",
        lambda keys, file: {"logit_scale": keys.number("logit_scale", 0.0625)},
        interleaved=True,
        understood=frozenset({"logit_scale"}),
    ),
    "cohere2": Described(
        "cohere2",
        lambda keys, file: {
            "logit_scale": keys.number("logit_scale", 0.0625),
            "sliding_window": keys.integer("attention.sliding_window", 4096),
        },
        interleaved=True,
        understood=frozenset({"logit_scale"}),
    ),
    "gpt2": Described("gpt2", _gpt2, _qkv),
    "gpt-oss": Described("gpt_oss", _gpt_oss, names=_GPT_OSS_NAMES),
    "deepseek2": Described(
        "deepseek_v2",
        _deepseek,
        _latent_cuts,
        _LATENT_NAMES,
        understood=frozenset(
            (
                *("attention.key_length_mla", "rope.scaling.yarn_log_multiplier", "expert_gating_func"),
                *("leading_dense_block_count", "expert_shared_count", "expert_group_count"),
                "expert_weights_scale",
            )
        ),
    ),
    "gptneox": Described(
        "gpt_neox", _neox, _qkv, partial=True, understood=frozenset({"use_parallel_residual"})
    ),
}
"""By llama.cpp's name."""
