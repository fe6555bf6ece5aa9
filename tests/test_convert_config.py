"""From config.json to a ModelSpec: both generations of transformers, four architectures, refusals."""

from typing import Any

import pytest

from edgert.config import ModelSpec
from edgert.converters.architectures import describe, source_name
from edgert.converters.hf_config import HfConfig
from edgert.errors import ConversionError, UnsupportedError
from edgert.format import declared
from tests.tiny_configs import CONFIGS

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "vocab_size": 1000,
}


def spec_of(model_type: str = "llama", generation: dict[str, Any] | None = None, **config: Any) -> ModelSpec:
    values = HfConfig(BASE | {"model_type": model_type} | config, "config.json")
    return describe(values, HfConfig(generation or {}, "generation_config.json")).spec


def test_absent_and_null_fields_take_the_defaults_of_transformers() -> None:
    nulls: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None, "rms_norm_eps": None}
    for absent in ({}, nulls):
        spec = spec_of(**absent)
        assert (spec.head_dim, spec.kv_heads, spec.norm_eps) == (8, 8, 1e-6)
        assert (spec.activation, spec.tied_embeddings, spec.rope_theta) == ("silu", False, 10000.0)
        assert (spec.bos_id, spec.eos_ids, spec.windows) == (None, (), ())


def test_the_head_size_of_qwen3_does_not_follow_from_its_width() -> None:
    assert spec_of("qwen3").head_dim == 128
    assert spec_of("qwen3", head_dim=32).head_dim == 32


LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3 | {"rope_type": "llama3"}, "rope_scaling": None},
    ],
    ids=["4.x", "4.x, older", "5.x", "5.x, theta outside"],
)
def test_rope_is_read_from_every_generation_of_config(config: dict[str, Any]) -> None:
    spec = spec_of(**config)
    assert (spec.rope_scaling, spec.rope_theta, spec.context) == ("llama3", 5e5, 4096)


def test_rope_without_scaling_needs_only_theta() -> None:
    for config in ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e6}}):
        spec = spec_of("qwen2", **config)
        assert (spec.rope_scaling, spec.rope_theta, spec.rope_magnitude) == ("default", 1e6, 1.0)


def test_a_longer_context_of_yarn_is_that_of_the_model() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert spec_of("qwen2", rope_scaling=yarn).context == 16384


@pytest.mark.parametrize(
    ("model_type", "config", "biases"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_are_those_of_the_architecture(
    model_type: str, config: dict[str, Any], biases: tuple[bool, ...]
) -> None:
    spec = spec_of(model_type, **config)
    assert (spec.qkv_bias, spec.output_bias, spec.ffn_bias, spec.qk_norm) == biases


@pytest.mark.parametrize(
    ("model_type", "config", "windows"),
    [
        ("mistral", {"sliding_window": 1024}, (1024,) * 4),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {}, ()),  # transformers' default, 4096, is the whole context here
        ("mistral", {"max_position_embeddings": 8192}, (4096,) * 4),
        ("qwen2", {"sliding_window": 1024}, ()),
        (
            "qwen2",
            {"sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 1024),
        ),
        ("qwen2", {"sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 0}, (1024,) * 4),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
        (
            "qwen3",
            {
                "sliding_window": 512,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (512, 0, 512, 0),
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 4}, ()),
    ],
)
def test_windows_are_those_of_each_layer(
    model_type: str, config: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert spec_of(model_type, **config).windows == windows


@pytest.mark.parametrize(
    "layer_types",
    [["full_attention"] * 3, ["sliding_attention"] * 4, ["full_attention"] * 3 + ["linear_attention"]],
)
def test_layer_types_that_do_not_fit_are_refused(layer_types: list[str]) -> None:
    with pytest.raises(UnsupportedError, match="found layer_types"):
        spec_of("qwen3", layer_types=layer_types)


@pytest.mark.parametrize(
    ("found", "activation"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_activations_go_by_several_names(found: str, activation: str) -> None:
    assert spec_of(hidden_act=found).activation == activation


def test_ends_of_text_come_from_both_files_without_repeats() -> None:
    spec = spec_of(generation={"eos_token_id": [7, 5], "bos_token_id": 9}, eos_token_id=5)
    assert (spec.eos_ids, spec.bos_id) == ((5, 7), 9)
    assert spec_of(generation={"bos_token_id": 9}, bos_token_id=1).bos_id == 1


LATENT = {
    key: value
    for key, value in CONFIGS["deepseek_v2_lite"].items()
    if key not in ("architectures", "model_type", "topk_method")
}


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"hidden_act": "quick_gelu"}),
        ("llama", {"pretraining_tp": 2}),
        ("llama", {"attn_logit_softcapping": 50.0}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}),
        ("llama", {"embedding_multiplier": 12.0}),
        ("llama", {"is_causal": False}),
        ("llama", {"sliding_window": 1024}),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}),
        ("mistral", {"attention_bias": True}),
        ("mistral", {"sliding_window": 1024, "use_sliding_window": False}),
        ("mistral", {"layer_types": ["full_attention"] * 4}),
        ("qwen2", {"mlp_bias": True}),
        ("qwen2", {"use_mrope": True}),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        ("jamba", {}),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}),
        ("gpt_oss", {"hidden_act": "gelu"}),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}),
        ("deepseek_v2", LATENT | {"norm_topk_prob": True}),
        ("deepseek_v2", LATENT | {"topk_method": "noaux_tc"}),
        ("deepseek_v2", LATENT | {"scoring_func": "sigmoid"}),
        ("deepseek_v2", LATENT | {"mlp_bias": True}),
        ("deepseek_v2", LATENT | {"moe_layer_freq": 2}),
        ("deepseek_v2", LATENT | {"kv_lora_rank": 24}),
        ("deepseek_v2", LATENT | {"num_key_value_heads": 2}),
        ("deepseek_v3", LATENT | {"scoring_func": "softmax"}),
        ("deepseek_v3", LATENT | {"topk_method": "greedy"}),
        ("deepseek_v3", LATENT | {"quantization_config": {"quant_method": "fp8"}}),
        ("deepseek_v3", LATENT | {"auto_map": {"AutoModelForCausalLM": "modeling_x.DeepseekV3ForCausalLM"}}),
        ("granitemoe", {"sliding_window": 8}),
        ("mixtral", {"layer_types": ["full_attention"]}),
        ("olmoe", {"clip_qkv": 8.0}),
        ("olmoe", {"sliding_window": 8}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}),
        ("qwen3_moe", {"layer_types": ["full_attention"]}),
        ("gemma", {"hidden_activation": "quick_gelu"}),
        ("gemma", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3SmallForCausalLM"}}),
        ("phi3", {"attention_bias": True}),
        ("granite", {"sliding_window": 8}),
        ("olmo2", {"layer_types": ["full_attention"] * 4}),
        ("glm4", {"sliding_window": 8}),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}),
        ("cohere2", {"layer_types": ["chunked_attention"] * 4}),
        ("cohere2", {"use_qk_norm": True}),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LLG"}),
        ("ministral", {"layer_types": ["linear_attention"] * 4}),
        ("starcoder2", {"layer_types": ["full_attention"] * 4}),
        ("stablelm", {"qk_layernorm": True}),
        ("cohere", {"use_qk_norm": True}),
        ("gpt2", {"n_positions": 64, "scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"n_positions": 64, "scale_attn_weights": False}),
        ("gpt2", {"n_positions": 64, "add_cross_attention": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 8}),
        ("opt", {"enable_bias": False}),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}),
        ("falcon", {"num_ln_in_parallel_attn": 2}),
        ("falcon", {"architectures": ["RWForCausalLM"]}),
        ("falcon", {"apply_residual_connection_post_layernorm": True}),
        ("phi3", {"lm_head_bias": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value), "moe"),
)
def test_what_changes_the_arithmetic_is_refused_not_ignored(model_type: str, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"found .*expected") as caught:
        spec_of(model_type, **config)
    assert "\n" not in str(caught.value)


def test_code_that_transformers_has_too_is_no_obstacle() -> None:
    code = {"AutoModelForCausalLM": "microsoft/Phi-3--modeling_phi3.Phi3ForCausalLM"}
    assert spec_of("phi3", architectures=["Phi3ForCausalLM"], auto_map=code).architecture == "phi3"


def test_fields_that_change_nothing_are_accepted() -> None:
    spec_of(
        architectures=["LLaMAForCausalLM"],
        attention_dropout=0.1,
        pretraining_tp=1,
        partial_rotary_factor=1.0,
        torch_dtype="bfloat16",
        use_cache=True,
        pruned_heads={},
        is_encoder_decoder=False,
        quantization_config=None,
        auto_map={"AutoTokenizer": "tokenization.Other"},
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 0}, "found num_attention_heads 0, expected a whole number >= 1"),
        ({"num_attention_heads": 8.0}, "found num_attention_heads 8.0"),
        ({"vocab_size": True}, "found vocab_size True"),
        ({"rms_norm_eps": float("nan")}, "found rms_norm_eps nan"),
        ({"tie_word_embeddings": 1}, "found tie_word_embeddings 1, expected true or false"),
        ({"eos_token_id": "2"}, "found eos_token_id '2'"),
        ({"eos_token_id": -1}, "found eos_token_id -1"),
        ({"num_hidden_layers": 2**31 - 1}, "found num_hidden_layers 2147483647, expected a whole number <="),
        ({"head_dim": 2**31 - 2}, "found heads of 2,147,483,646 values, expected at most"),
        ({"hidden_size": 2**50}, "found heads of"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"rope_scaling": [1]}, r"found rope_scaling \[1\], expected an object"),
    ],
)
def test_damaged_fields_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        spec_of(**config)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "x" * 5000},
        {"architectures": ["x" * 5000]},
        {"rope_parameters": {"rope_type": "x" * 5000}},
        {"vocab_size": "x" * 5000},
    ],
)
def test_a_message_stays_short_whatever_the_file_says(config: dict[str, Any]) -> None:
    with pytest.raises(ConversionError) as caught:
        spec_of(**config)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_tensor_names_are_those_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    values = BASE | {"model_type": model_type, "head_dim": 8, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        oracle = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    spec = spec_of(model_type, head_dim=8, num_key_value_heads=2)
    ours = {source_name(d.name): d.shape for d in declared(spec) if d.name != "rope_frequencies"}
    assert ours == {name: tuple(tensor.shape) for name, tensor in oracle.items()}


def test_experts_are_read_as_published_configs_give_them() -> None:
    """OLMoE-1B-7B-0924 and Qwen3-30B-A3B; Qwen1.5-MoE-A2.7B with layers made dense."""
    olmoe = spec_of(
        "olmoe", intermediate_size=1024, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False
    )
    assert (olmoe.experts, olmoe.active_experts, olmoe.expert_width) == (64, 8, 1024)
    assert (olmoe.joint_qk_norm, olmoe.normalized_routing, olmoe.has_dense_layers) == (True, False, False)
    qwen3 = spec_of("qwen3_moe", num_experts=128, moe_intermediate_size=768, norm_topk_prob=True)
    assert (qwen3.experts, qwen3.active_experts, qwen3.expert_width) == (128, 8, 768)
    assert (qwen3.qk_norm, qwen3.normalized_routing, qwen3.shared_width) == (True, True, 0)
    qwen2 = spec_of(
        "qwen2_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3], num_experts=60,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts_per_tok=4,
    )  # fmt: skip
    assert qwen2.dense_layers == (0, 2, 3, 4)
    assert [qwen2.has_experts(i) for i in range(6)] == [False, True, False, False, False, True]
    assert (qwen2.shared_width, qwen2.qkv_bias, qwen2.normalized_routing) == (5632, True, False)
