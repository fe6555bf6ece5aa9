"""Blocks other than Llama's: a row's bits depend on nothing but its own tokens and positions."""

from typing import Any

import numpy as np
import pytest

from edgert.config import EngineConfig, KvType, ModelSpec
from edgert.errors import OptionError
from edgert.model.forward import Forward
from tests import kernel_inputs as inputs

SIZES: Any = (3, 72, 6, 2, 20, 100, 90, 64, 1e-5)
AROUND: dict[str, Any] = {"ropes": (1, 0, 2), "windows": (9, 0, 9), "attention_cap": 5.0, "logit_cap": 3.0}
PLAIN: dict[str, Any] = {"layer_norm": True, "norm_bias": True, "plain_ffn": True}
NO_ROPE: dict[str, Any] = {"ropes": (2, 2, 2)}
EXPERTS: dict[str, Any] = {"experts": 8, "active_experts": 3, "expert_width": 40}
BIASED: dict[str, Any] = EXPERTS | {
    "expert_biases": True,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 0.5,
    "qkv_bias": True,
    "output_bias": True,
    "normalized_routing": True,
}
LATENT: dict[str, Any] = EXPERTS | {
    "latent": 64,
    "query_latent": 40,
    "plain_dim": 32,
    "value_dim": 48,
    "output_bias": True,
    "sigmoid_routing": True,
    "normalized_routing": True,
    "routing_groups": 4,
    "active_groups": 2,
    "shared_width": 33,
    "open_shared": True,
    "dense_layers": (0,),
}
GREEDY: dict[str, Any] = EXPERTS | {"latent": 32, "plain_dim": 64, "value_dim": 16, "routing_groups": 2}
GREEDY |= {"active_groups": 1, "shared_width": 40, "open_shared": True}
SPECS = {
    "around": ModelSpec("gemma2", *SIZES, "gelu_tanh", block="around", **AROUND),
    "post": ModelSpec("olmo2", *SIZES, block="post", joint_qk_norm=True),
    "parallel": ModelSpec("gpt_neox", *SIZES, "gelu", block="parallel", rotary=6, **PLAIN),
    "shared": ModelSpec("cohere", *SIZES, block="parallel", shared_norm=True, layer_norm=True),
    "learned": ModelSpec("gpt2", *SIZES, "gelu_tanh", learned_positions=True, **PLAIN, **NO_ROPE),
    "alibi": ModelSpec("falcon", *SIZES, "gelu", alibi=True, **PLAIN, **NO_ROPE),
    "sinks": ModelSpec("gpt_oss", *SIZES, windows=(9, 0, 9), sinks=True, **BIASED),
    "latent": ModelSpec("deepseek_v3", 3, 72, 6, 1, 80, 100, 90, 64, 1e-5, rotary=16, **LATENT),
    "greedy": ModelSpec("deepseek_v2", 3, 72, 5, 1, 48, 100, 90, 64, 1e-5, rotary=16, **GREEDY),
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


def forward(spec: ModelSpec, threads: int = 1, kv: KvType = "f16", context: int = 64) -> Forward:
    turns = ("q4", "q8", "f16", "f32")
    weights = inputs.tiny_weights(spec, lambda name: turns[sum(name.encode()) % 4], "blocks")
    return Forward(weights, EngineConfig(threads, context, 16, kv))


def plain(spec: ModelSpec, kv: KvType = "f16") -> Any:
    """Logits of every row, one row at a time."""
    model = forward(spec, kv=kv)
    try:
        return np.array([model.run([token], outputs=[0])[0].copy() for token in TOKENS])
    finally:
        model.close()


@pytest.mark.parametrize("name", SPECS)
def test_rows_together_have_the_bits_they_have_alone(name: str) -> None:
    model = forward(SPECS[name], threads=2)
    try:
        found = model.run(TOKENS, outputs=range(len(TOKENS)))
        inputs.same(found, plain(SPECS[name]))
    finally:
        model.close()


@pytest.mark.compiled
@pytest.mark.parametrize("kv", ["f16", "q8", "q4"])
@pytest.mark.parametrize("name", SPECS)
def test_a_branch_of_a_tree_has_the_bits_of_the_sequence(name: str, kv: KvType) -> None:
    """Wrong guesses lie between its nodes, so positions and slots differ."""
    model, expected = forward(SPECS[name], kv=kv), plain(SPECS[name], kv)
    try:
        model.run(TOKENS[:8])
        right, wrong = TOKENS[8:12], [11, 22, 33]
        tokens = [right[0], wrong[0], right[1], wrong[1], wrong[2], right[2], right[3]]
        parents = [-1, -1, 0, 0, 1, 2, 5]
        found = model.run(tokens, parents=parents, outputs=[0, 2, 5, 6])
        inputs.same(found, expected[8:12])
        model.keep([0, 2, 5, 6])
        inputs.same(model.run(TOKENS[12:], outputs=[0, 1]), expected[12:])
    finally:
        model.close()


@pytest.mark.compiled
@pytest.mark.parametrize("name", SPECS)
def test_layers_can_be_run_in_ranges(name: str) -> None:
    model = forward(SPECS[name])
    try:
        middle = model.run(TOKENS, layers=(0, 2)).copy()
    finally:
        model.close()
    upper = forward(SPECS[name])
    try:
        found = upper.run(TOKENS, layers=(2, 3), hidden=middle, outputs=range(len(TOKENS)))
        inputs.same(found, plain(SPECS[name]))
    finally:
        upper.close()


def test_positions_end_where_those_learned_end() -> None:
    with pytest.raises(OptionError, match="context is 80; this model has 64 positions"):
        forward(SPECS["learned"], context=80)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": "sideways"}, "block is 'sideways', expected one of"),
        ({"shared_norm": True}, "shared_norm is true in a pre block"),
        ({"rotary": 22}, "rotary is 22, expected an even number up to 20"),
        ({"rotary": 5}, "rotary is 5"),
        ({"ropes": (0, 0)}, "ropes has 2 entries for 3 layers"),
        ({"ropes": (0, 0, 3)}, r"ropes is \(0, 0, 3\), expected 0 to 2"),
        ({"logit_cap": -1.0}, "logit_cap is -1.0, expected a number >= 0"),
        ({"layer_norm": 1}, "layer_norm is 1, expected true or false"),
        ({"layer_norm": True, "exits": (1,)}, "exits in a model with LayerNorm"),
        ({"block": "post", "experts": 4, "active_experts": 1, "expert_width": 8}, "experts in a block"),
        ({"plain_ffn": True, "neurons": True}, "neurons is true"),
        ({"plain_dim": 32}, "latent is 0, expected a number above 0"),
        ({"latent": 20}, "latent is 20, expected a multiple of 32"),
        ({"latent": 32, "plain_dim": 32, "value_dim": 16}, "rotary is 0, expected a multiple of 16"),
        (
            {"latent": 32, "plain_dim": 32, "value_dim": 16, "rotary": 16},
            "kv_heads is 2 and head_dim 20 in a model with a latent, expected 1 and 48",
        ),
        (EXPERTS | {"routing_groups": 3, "active_groups": 1}, "1 of 3 groups of 8 experts"),
        (EXPERTS | {"active_groups": 1}, "active_groups is 1 without routing_groups"),
        (EXPERTS | {"routing_groups": 4, "active_groups": 1}, "active_experts is 3, but 1 groups hold 2"),
        (EXPERTS | {"swiglu_limit": 7.0}, "one of swiglu_alpha and swiglu_limit is 0"),
        (EXPERTS | {"open_shared": True}, "open_shared is true without a shared_width"),
        ({"sigmoid_routing": True}, "experts is 0"),
    ],
)
def test_a_spec_that_cannot_be_computed_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec("llama", *SIZES, **changed)
