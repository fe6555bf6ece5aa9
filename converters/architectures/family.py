"""What the decoders of the Llama family share: config fields, tensor names, and what is refused."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import Activation, ModelSpec
from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.rope import make_rope
from edgert.converters.safetensors_source import ITEM_BYTES, SourceTensor
from edgert.errors import ConversionError, UnsupportedError

ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# Fields of models that share these names but compute something else (Granite, MiniCPM, Gemma,
# OLMo, Cohere, mixtures of experts, adapters), each with the values that change nothing. A variant
# that computes one says so.
# transformers ignores some of them; a checkpoint that sets one was not trained without it.
REFUSED: Final[dict[str, tuple[object, ...]]] = {
    "quantization_config": (),
    "compression_config": (),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_mrope": (False,),
    "alibi": (False,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "per_layer_config": (),
    "pruned_heads": ({},),
}

# The deepest models published have fewer than 200.
MAX_LAYERS: Final = 1 << 14

_TOP_NAMES: Final = {
    "token_embedding": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k": "self_attn.k_proj.weight",
    "k_bias": "self_attn.k_proj.bias",
    "v": "self_attn.v_proj.weight",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "o_bias": "self_attn.o_proj.bias",
    "ffn_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
    "shared_router": "mlp.shared_expert_gate.weight",
    "shared_gate": "mlp.shared_expert.gate_proj.weight",
    "shared_up": "mlp.shared_expert.up_proj.weight",
    "shared_down": "mlp.shared_expert.down_proj.weight",
    "experts.gate": "mlp.experts.{}.gate_proj.weight",
    "experts.up": "mlp.experts.{}.up_proj.weight",
    "experts.down": "mlp.experts.{}.down_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up": "mlp.up_proj.weight",
    "up_bias": "mlp.up_proj.bias",
    "down": "mlp.down_proj.weight",
    "down_bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """Where one architecture differs from the others; the rest is read from the config."""

    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # where the config has none; None for width / heads
    windows: tuple[int, ...] = ()  # per layer, as ModelSpec.windows
    joint_qk_norm: bool = False
    experts: "Experts | None" = None
    names: Mapping[str, str] = field(default_factory=dict)  # where they differ from the family's
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # as granitemoe.FUSED
    factors: Mapping[str, float] = field(default_factory=dict)  # by the name of the tensor in its layer
    understood: frozenset[str] = frozenset()  # keys of REFUSED that this architecture computes


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one architecture, as the fields of ModelSpec."""

    count: int
    active: int
    width: int
    normalized: bool
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a config.json describes."""

    spec: ModelSpec
    rope_frequencies: NDArray[np.float32]  # [d/2]
    variant: Variant = Variant()

    def source_name(self, name: str) -> str:
        """The name in the checkpoint of a tensor, or of one matrix of an expert."""
        return source_name(name, self.variant.names)

    def factor(self, name: str) -> float:
        """What a tensor is multiplied by on its way into the file."""
        if name.startswith("exits."):  # an exit uses the same output matrix, so its last gain bears the same
            name = name.rpartition(".")[2]
        factor = self.variant.factors.get(_part(name)[0], 1.0)
        if name == "output_norm" and self.spec.tied_embeddings:  # the output matrix has the embedding's
            factor /= self.factor("token_embedding")
        return factor

    def split(self, tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
        """The tensors with those of all experts of a layer cut into one for each matrix."""
        return dict(_cut(tensors.items(), self.variant, self.spec))


def source_name(name: str, own: Mapping[str, str] | None = None) -> str:
    """The Hugging Face name of a tensor of `edgert.format.declared`, or of one matrix of an expert.

    The same in the whole family but for the names in `own`. Exit heads are ours and have one name.
    """
    if name.startswith("exits."):
        return name
    part, layer, expert = _part(name)
    if layer is None:
        return _TOP_NAMES[part]
    return f"model.layers.{layer}.{(_LAYER_NAMES | dict(own or {}))[part].format(expert)}"


def _cut(
    tensors: Iterable[tuple[str, SourceTensor]], variant: Variant, spec: ModelSpec
) -> Iterator[tuple[str, SourceTensor]]:
    for name, tensor in tensors:
        match name.split(".", 3):
            case ["model", "layers", layer, part] if part in variant.fused and tensor.dtype in ITEM_BYTES:
                matrices = variant.fused[part]
                width, inner = spec.width, spec.expert_width
                rows, columns = (width, inner) if matrices == ("experts.down",) else (inner, width)
                if tensor.shape == (spec.experts, len(matrices) * rows, columns):
                    for expert in range(spec.experts):
                        for j, matrix in enumerate(matrices):
                            own = source_name(
                                f"layers.{layer}.{matrix.replace('.', f'.{expert}.')}", variant.names
                            )
                            yield own, tensor.part((expert * len(matrices) + j) * rows, rows, columns)
                    continue
        yield name, tensor


def _part(name: str) -> tuple[str, str | None, str | None]:
    """ "layers.3.experts.5.up" to ("experts.up", "3", "5"), "layers.3.q" to ("q", "3", None)."""
    match name.split("."):
        case ["layers", layer, "experts", expert, part]:
            return f"experts.{part}", layer, expert
        case ["layers", layer, part]:
            return part, layer, None
    return name, None, None


def read_decoder(config: HfConfig, generation: HfConfig, variant: Variant) -> Decoder:
    """The decoder of a config.json and its generation_config.json.

    Raises UnsupportedError for anything that changes the arithmetic and that edgert does not
    compute, ConversionError for fields that are missing or contradict each other.
    """
    _refuse(config, variant.understood)
    experts = variant.experts or Experts(0, 0, 0, False)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", variant.head_dim or max(1, width // heads))
    positions = config.integer("max_position_embeddings")
    rope = make_rope(_rope_parameters(config), head_dim, positions)
    try:
        spec = ModelSpec(
            architecture=config.text("model_type"),
            layers=layer_count(config),
            width=width,
            heads=heads,
            kv_heads=config.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            ffn_width=config.integer("intermediate_size"),
            vocab=config.integer("vocab_size"),
            context=rope.context,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            activation=_activation(config),
            tied_embeddings=config.flag("tie_word_embeddings"),
            qkv_bias=variant.qkv_bias,
            output_bias=variant.output_bias,
            ffn_bias=variant.ffn_bias,
            qk_norm=variant.qk_norm,
            joint_qk_norm=variant.joint_qk_norm,
            experts=experts.count,
            active_experts=experts.active,
            expert_width=experts.width,
            shared_width=experts.shared_width,
            normalized_routing=experts.normalized,
            dense_layers=experts.dense_layers,
            windows=_binding(variant.windows, rope.context),
            rope_theta=rope.theta,
            rope_scaling=rope.kind,
            rope_magnitude=rope.magnitude,
            bos_id=next(iter(config.ids("bos_token_id") + generation.ids("bos_token_id")), None),
            # A dictionary keeps the first of each in order.
            eos_ids=tuple(dict.fromkeys(config.ids("eos_token_id") + generation.ids("eos_token_id"))),
        )
    except ValueError as error:
        raise ConversionError(f"{config.where}: {error}; download the model's files again") from None
    return Decoder(spec, rope.frequencies, variant)


def layer_count(config: HfConfig) -> int:
    """`num_hidden_layers`, bounded before anything is made for each of them."""
    return config.integer("num_hidden_layers", most=MAX_LAYERS)


def window_size(config: HfConfig) -> int:
    """`sliding_window` where it is used: W lets position p see keys p - W + 1 to p; 4096 if absent.

    transformers' `sliding_window_overlay` allows keys > p - W, so W counts the token itself as
    ModelSpec.windows does. A null is no window, 0.
    """
    if "sliding_window" in config.values and not config.has("sliding_window"):
        return 0
    return config.integer("sliding_window", 4096)


def layer_windows(config: HfConfig) -> tuple[int, ...]:
    """The windows of Qwen: per layer as `layer_types` says, or from `max_window_layers` up."""
    layers = layer_count(config)
    size = window_size(config) if config.flag("use_sliding_window") else 0
    kinds = config.texts("layer_types")
    if not kinds:
        first = config.integer("max_window_layers", 28, least=0)
        kinds = ["sliding_attention" if size and i >= first else "full_attention" for i in range(layers)]
    known = {"full_attention": 0, "sliding_attention": size}
    if len(kinds) != layers or not set(kinds) <= set(known) or (not size and "sliding_attention" in kinds):
        raise UnsupportedError(
            f"{config.where}: found layer_types {shown(sorted(set(kinds)))} for {len(kinds)} layers with "
            f"sliding_window {size}, expected {layers} of full_attention or sliding_attention; "
            "convert another version of the model"
        )
    return tuple(known[kind] for kind in kinds)


def _binding(windows: tuple[int, ...], context: int) -> tuple[int, ...]:
    """Windows without those as long as the context, which hide nothing."""
    kept = tuple(window if window < context else 0 for window in windows)
    return kept if any(kept) else ()


def dense_layers(config: HfConfig) -> tuple[int, ...]:
    """The dense layers of Qwen's models with experts: all that no `decoder_sparse_step` ends, and those
    of `mlp_only_layers`."""
    layers, step = layer_count(config), config.integer("decoder_sparse_step", 1)
    named = config.ids("mlp_only_layers")
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)


def _refuse(config: HfConfig, understood: frozenset[str]) -> None:
    for key, neutral in REFUSED.items():
        if key in understood:
            continue
        config.refuse_unless(key, *neutral)
    model_type = config.text("model_type")
    expected = f"{model_type.replace('_', '')}ForCausalLM"
    found = config.texts("architectures")
    if found and expected.lower() not in (name.lower() for name in found):
        raise UnsupportedError(
            f"{config.where}: found architectures {shown(found)}, expected {expected} for model_type "
            f"{model_type}; convert the language model itself"
        )
    if "AutoModelForCausalLM" in config.child("auto_map").values:
        raise UnsupportedError(
            f"{config.where}: found auto_map, a model with code of its own, expected transformers' "
            f"{expected}; convert a version without custom code"
        )


def _activation(config: HfConfig) -> Activation:
    name = config.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"{config.where}: found hidden_act {shown(name)}, expected one of {', '.join(ACTIVATIONS)}; "
            "convert another version of the model"
        )
    return ACTIVATIONS[name]


def _rope_parameters(config: HfConfig) -> HfConfig:
    """One flat object from the fields of transformers 4.x and 5.x, by the precedence of 5.x.

    4.x wrote rope_theta and rope_scaling (its type also as "type") at the top; 5.x writes
    rope_parameters. In 5.x rope_scaling still wins where both are set.
    """
    key = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    found = config.child(key)
    if any(isinstance(value, dict) for value in found.values.values()):
        raise UnsupportedError(
            f"{found.where}: found parameters per kind of layer, expected one set for all layers; "
            "convert another version of the model"
        )
    values = {name: value for name, value in found.values.items() if value is not None}
    if "type" in values:
        values.setdefault("rope_type", values["type"])
    if config.has("rope_theta"):
        values.setdefault("rope_theta", config.values["rope_theta"])
    if config.has("original_max_position_embeddings"):
        values["original_max_position_embeddings"] = config.values["original_max_position_embeddings"]
    return HfConfig(values, found.where)
