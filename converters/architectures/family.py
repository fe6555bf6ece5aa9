"""From config.json to a spec: what the decoders of the Llama family share, and where others differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE, ModelSpec
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.names import parts_of
from edgert.converters.architectures.refused import activation_of, refuse
from edgert.converters.architectures.windows import binding, layer_count
from edgert.converters.hf_config import HfConfig
from edgert.converters.rope import MAX_HEAD_DIM, make_rope
from edgert.converters.safetensors_source import SourceTensor
from edgert.errors import ConversionError, UnsupportedError
from edgert.format.tensors import rope_name


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
    latents: "Latents | None" = None
    fields: Mapping[str, Any] = field(default_factory=dict)  # further ones of ModelSpec
    class_name: str = ""  # of transformers, where it does not follow from the model_type
    keys: Mapping[str, str] = field(default_factory=dict)  # what a key of Llama is called here
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys of Llama
    layout: Layout = field(default_factory=Layout)
    factors: Mapping[str, float] = field(default_factory=dict)  # by the name of the tensor in its layer
    one_more: frozenset[str] = frozenset()  # gains stored as what they differ by from 1
    partial_rotary: float | None = None  # what is rotated of a head by default, where the config may say
    rope: HfConfig | None = None  # parameters where they are not those of the config
    local_rope: HfConfig | None = None  # of the layers that ModelSpec.ropes says
    computed: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # vectors no file has
    understood: frozenset[str] = frozenset()  # keys of REFUSED that this architecture computes


@dataclass(frozen=True, slots=True)
class Latents:
    """Latent attention of one architecture: `width` and the fields of ModelSpec."""

    width: int  # of the latent of keys and values
    query_width: int  # of that of queries; 0: they are made of the layer's input
    plain: int
    rotary: int
    value: int


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
    computed: Mapping[str, NDArray[np.float32]]  # tensors that no checkpoint has, the rope frequencies first
    variant: Variant = field(default_factory=Variant)

    def source_name(self, name: str) -> str:
        """The name in the checkpoint of a tensor, or of one matrix of an expert."""
        return self.variant.layout.source_name(name)

    def factor(self, name: str) -> float:
        """What a tensor is multiplied by on its way into the file."""
        if name.startswith("exits."):  # an exit uses the same output matrix, so its last gain bears the same
            name = name.rpartition(".")[2]
        factor = self.variant.factors.get(parts_of(name)[0], 1.0)
        if name == "output_norm" and self.spec.tied_embeddings:  # the output matrix has the embedding's
            factor /= self.factor("token_embedding")
        return factor

    def offset(self, name: str) -> float:
        """What is added to a vector of the checkpoint before that."""
        return 1.0 if parts_of(name)[0] in self.variant.one_more else 0.0

    def split(self, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """The tensors of a checkpoint with each of ours by itself."""
        layout = self.variant.layout
        return layout.split(layout.untangled(tensors, self.spec), self.spec)


def read_decoder(config: HfConfig, generation: HfConfig, variant: Variant) -> Decoder:
    """The decoder of a config.json and its generation_config.json.

    Raises UnsupportedError for anything that changes the arithmetic and that edgert does not
    compute, ConversionError for fields that are missing or contradict each other.
    """
    config = config.renamed(variant.keys, variant.defaults)
    refuse(config, variant.understood, variant.class_name)
    experts = variant.experts or Experts(0, 0, 0, False)
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", variant.head_dim or max(1, width // heads))
    kv_heads = config.integer("num_key_value_heads", heads)
    latents = variant.latents
    if latents:  # one key and value for all heads
        kv_heads, head_dim = 1, latents.rotary + latents.width
    positions = config.integer("max_position_embeddings")
    parameters = variant.rope or rope_parameters(config)
    rotary = latents.rotary if latents else _rotary(config, parameters, variant, head_dim)
    rope = make_rope(parameters, rotary or head_dim, positions)
    try:
        spec = ModelSpec(
            architecture=config.text("model_type"),
            layers=layer_count(config),
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_width=config.integer("intermediate_size"),
            vocab=config.integer("vocab_size"),
            context=rope.context,
            norm_eps=config.number("rms_norm_eps", 1e-6),
            activation=activation_of(config),
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
            latent=latents.width if latents else 0,
            query_latent=latents.query_width if latents else 0,
            plain_dim=latents.plain if latents else 0,
            value_dim=latents.value if latents else 0,
            windows=binding(variant.windows, rope.context),
            rope_theta=rope.theta,
            rope_scaling=rope.kind,
            rope_magnitude=rope.magnitude,
            rotary=rotary,
            bos_id=next(iter(config.ids("bos_token_id") + generation.ids("bos_token_id")), None),
            # A dictionary keeps the first of each in order.
            eos_ids=tuple(dict.fromkeys(config.ids("eos_token_id") + generation.ids("eos_token_id"))),
            **variant.fields,
        )
    except ValueError as error:
        raise ConversionError(f"{config.where}: {error}; download the model's files again") from None
    computed = {rope_name(GLOBAL_ROPE): rope.frequencies, **variant.computed}
    if variant.local_rope is not None:
        local = make_rope(variant.local_rope, rotary or head_dim, positions)
        computed[rope_name(LOCAL_ROPE)] = local.frequencies
    return Decoder(spec, computed, variant)


PLAIN: Final[Mapping[str, Any]] = {"layer_norm": True, "norm_bias": True, "plain_ffn": True}
"""Fields of ModelSpec of decoders in GPT-2's line: LayerNorms with biases, a feed-forward without a gate."""


def learned_positions(config: HfConfig) -> dict[str, Any]:
    """Fields of ModelSpec of those among them that add a vector for each position, and rotate nothing."""
    return {**PLAIN, "learned_positions": True, "ropes": without_rope(config)}


def without_rope(config: HfConfig) -> tuple[int, ...]:
    """ModelSpec.ropes of a model that has no layer with rotary embedding."""
    return (NO_ROPE,) * layer_count(config)


def head_size(config: HfConfig) -> int:
    """Dimensions of a head, where the config says or implies them."""
    usual = max(1, model_width(config) // config.integer("num_attention_heads"))
    return config.integer("head_dim", usual, most=MAX_HEAD_DIM)


def model_width(config: HfConfig) -> int:
    """`hidden_size`, bounded before anything is computed of it."""
    return config.integer("hidden_size", most=1 << 31)


def _rotary(config: HfConfig, parameters: HfConfig, variant: Variant, head_dim: int) -> int:
    """ModelSpec.rotary: 0, or fewer dimensions than a head has."""
    if variant.partial_rotary is None:
        parameters.refuse_unless("partial_rotary_factor", 1)
        config.refuse_unless("partial_rotary_factor", 1)
        return 0
    share = config.number("partial_rotary_factor", variant.partial_rotary)
    rotary = int(head_dim * parameters.number("partial_rotary_factor", share))
    if not 0 < rotary <= head_dim:
        raise ConversionError(
            f"{parameters.where}: found a partial_rotary_factor of {share} of {head_dim} dimensions, "
            "expected some of them; download the model's files again"
        )
    return rotary if rotary < head_dim else 0


def rope_parameters(config: HfConfig) -> HfConfig:
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


def rope_of_kind(config: HfConfig, kind: str, key: str, theta: float) -> HfConfig:
    """The rotary parameters of one kind of layer: transformers 5 has an object for each."""
    own = config.child("rope_parameters").child(kind)
    values = dict(own.values)
    if kind == "full_attention" and config.has("rope_scaling"):
        scaling = HfConfig({"rope_scaling": config.values["rope_scaling"]}, config.where)
        values |= rope_parameters(scaling).values
    values.setdefault("rope_theta", config.number(key, theta))
    return HfConfig(values, own.where)
