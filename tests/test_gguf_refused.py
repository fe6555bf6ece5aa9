"""GGUF files that cannot be converted: one line of why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.errors import ConversionError, EdgertError, NotAModelError, OptionError, UnsupportedError
from tests.test_gguf_convert import Change, exported, rewritten

REFUSED: dict[str, tuple[Change, dict[str, Any], type[EdgertError], str]] = {
    "architecture": (
        {"general.architecture": "jamba"},
        {},
        UnsupportedError,
        "found architecture 'jamba', expected one of llama, qwen2, qwen3, qwen2moe, qwen3moe, olmoe",
    ),
    "adapter": ({"general.type": "adapter"}, {}, NotAModelError, "a GGUF file of type 'adapter'"),
    "experts without number": ({"llama.expert_count": 8}, {}, ConversionError, "found no expert_used_count"),
    "experts that are not there": (
        {"llama.expert_count": 8, "llama.expert_used_count": 2},
        {},
        ConversionError,
        "expert_width is 0",
    ),
    "more experts than any model has": (
        {"llama.expert_count": 2**31},
        {},
        ConversionError,
        "found expert_count 2147483648, expected a whole number <= 4096",
    ),
    "routing of another kind": (
        {"llama.expert_gating_func": 2},
        {},
        UnsupportedError,
        "found expert_gating_func 2",
    ),
    "no layers": ({"llama.block_count": None}, {}, ConversionError, "llama: found no block_count"),
    "layers as text": ({"llama.block_count": "2"}, {}, ConversionError, "found block_count '2'"),
    "more layers than tensors": (
        {"llama.block_count": 2**31 - 1},
        {},
        ConversionError,
        "found block_count 2147483647, expected",
    ),
    "a third layer": (
        {"llama.block_count": 3},
        {},
        ConversionError,
        "found no tensor blk.2.attn_norm.weight",
    ),
    "heads of several kinds": (
        {"llama.attention.head_count_kv": [2, 4]},
        {},
        UnsupportedError,
        r"found attention.head_count_kv \[2, 4\], expected one number for all layers",
    ),
    "no heads": (
        {"llama.attention.head_count_kv": [0, 0]},
        {},
        ConversionError,
        "head_count_kv' 0, expected",
    ),
    "heads that do not divide": ({"llama.attention.head_count_kv": 3}, {}, ConversionError, "kv_heads 3"),
    "heads of two billion": (
        {
            "llama.attention.key_length": 2**31 - 2,
            "llama.attention.value_length": 2**31 - 2,
            "llama.rope.dimension_count": 2**31 - 2,
        },
        {},
        ConversionError,
        "found heads of 2,147,483,646 values",
    ),
    "values of another size": (
        {"llama.attention.value_length": 8},
        {},
        UnsupportedError,
        "found attention.value_length 8 where keys take 16",
    ),
    "partial rotary embedding": (
        {"llama.rope.dimension_count": 8},
        {},
        UnsupportedError,
        "found rope.dimension_count 8 where keys take 16",
    ),
    "rope scaling": (
        {"llama.rope.scaling.type": "longrope"},
        {},
        UnsupportedError,
        "found rope.scaling.type 'longrope'",
    ),
    "soft caps": (
        {"llama.attn_logit_softcapping": 50.0},
        {},
        UnsupportedError,
        "found attn_logit_softcapping 50.0",
    ),
    "an array where a number belongs": (
        {"llama.logit_scale": [1, 8]},
        {},
        UnsupportedError,
        r"found logit_scale \[1, 8\]",
    ),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        {},
        ConversionError,
        "found no attention.layer_norm_rms_epsilon",
    ),
    "window of qwen": (
        {"general.architecture": "qwen2", "qwen2.attention.sliding_window": 8}
        | {
            f"qwen2.{key}": value
            for key, value in {
                "block_count": 2,
                "embedding_length": 64,
                "context_length": 256,
                "feed_forward_length": 96,
                "attention.head_count": 4,
                "attention.head_count_kv": 2,
                "attention.layer_norm_rms_epsilon": 1e-5,
            }.items()
        },
        {},
        UnsupportedError,
        "qwen2: found attention.sliding_window 8 below the context",
    ),
    "rope factors": (
        {},
        {"rope_freqs.weight": np.ones(7, np.float32)},
        ConversionError,
        r"found rope_freqs.weight of shape \[7\]",
    ),
    "rope factors of 0": (
        {},
        {"rope_freqs.weight": np.zeros(8, np.float32)},
        ConversionError,
        "expected 8 numbers > 0",
    ),
    "no embedding": ({}, {"token_embd.weight": None}, ConversionError, "found none for token_embd.weight"),
    "an embedding that is a vector": (
        {},
        {"token_embd.weight": np.zeros(8, np.float32)},
        ConversionError,
        r"found \[8\] for token_embd.weight",
    ),
    "a tensor that is missing": (
        {},
        {"blk.1.ffn_up.weight": None},
        ConversionError,
        r"found no tensor blk.1.ffn_up.weight, expected one of shape \[96, 64\]",
    ),
    "a tensor of another shape": (
        {},
        {"blk.1.ffn_up.weight": np.zeros((64, 96), np.float32)},
        ConversionError,
        r"found blk.1.ffn_up.weight of shape \[64, 96\], expected \[96, 64\]",
    ),
    "a tensor of integers": (
        {},
        {"blk.1.ffn_up.weight": np.zeros((96, 64), np.int32)},
        UnsupportedError,
        "found blk.1.ffn_up.weight as I32",
    ),
    "a tensor that llama does not have": (
        {},
        {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)},
        UnsupportedError,
        "found 1 tensors that llama does not have, first 'blk.0.attn_sinks.weight'",
    ),
    "a bias in one layer only": (
        {},
        {"blk.0.attn_q.bias": np.zeros(64, np.float32)},
        ConversionError,
        "found no tensor blk.0.attn_k.bias",
    ),
    "weights that are not finite": (
        {},
        {"blk.0.ffn_up.weight": np.full((96, 64), np.nan, np.float32)},
        ConversionError,
        "layers.0.up: found NaN or infinity",
    ),
    "more tokens than rows": (
        {"llama.vocab_size": 64},
        {"token_embd.weight": np.zeros((64, 64), np.float32)},
        ConversionError,
        "found 128 tokens and token_embd.weight of 64 rows",
    ),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, {}, ConversionError, "no tokenizer.ggml.tokens"),
    "a template that is a number": (
        {"tokenizer.chat_template": 5},
        {},
        ConversionError,
        "found 'tokenizer.chat_template' 5, expected a string",
    ),
    "an end beyond the vocabulary": (
        {"tokenizer.ggml.eos_token_id": 999},
        {},
        ConversionError,
        "tokenizer.ggml.eos_token_id 999",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_one_line(name: str, tmp_path: Path) -> None:
    change, tensors, kind, expected = REFUSED[name]
    path = rewritten(tmp_path, change, tensors)
    before = set(tmp_path.iterdir())
    with pytest.raises(kind, match=expected) as caught:
        edgert.convert(path, tmp_path / "m.ert")
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_a_quant_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="quant is 'q5'"):
        edgert.convert(exported(tmp_path), tmp_path / "m.ert", quant="q5")  # type: ignore[arg-type]


def test_exits_belong_to_folders(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected none for a GGUF file"):
        edgert.convert(exported(tmp_path), tmp_path / "m.ert", exits=tmp_path / "exits.safetensors")
