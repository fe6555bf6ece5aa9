"""From the metadata of a GGUF file to the model it describes.

Keys are named after the architecture (`llama.block_count`). llama.cpp gives one name, "llama", to
every model it computes like Llama; Mistral is one of them.
"""

from collections.abc import Iterable
from typing import Final

from edgert.config import GLOBAL_ROPE, ModelSpec
from edgert.converters.architectures import Decoder
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant
from edgert.converters.gguf.architectures import (
    ARCHITECTURES,
    LAYERS,
    NAMES,
    REFUSED,
    Architecture,
    gguf_name,
)
from edgert.converters.gguf.described import DESCRIBED, read_described
from edgert.converters.gguf.keys import (
    bos_id,
    divided,
    has,
    head_dim,
    layer_count,
    own_keys,
    rope_parameters,
    rows_of,
    uniform,
    vocab,
)
from edgert.converters.gguf.reader import GgufFile
from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.rope import make_rope
from edgert.errors import ConversionError, NotAModelError, UnsupportedError
from edgert.format.tensors import rope_name

# The most experts of a published model are 512; for each of a layer's, three tensors are listed.
MAX_EXPERTS: Final = 1 << 12


def read_decoder(file: GgufFile, eos_ids: Iterable[int]) -> Decoder:
    """The decoder of a GGUF file; `eos_ids` end its texts.

    Raises UnsupportedError for an architecture or an option edgert does not compute, NotAModelError
    for a GGUF file of something else, ConversionError for keys that are missing or impossible.
    """
    name = _name(file)
    if name in DESCRIBED:
        return read_described(file, name, eos_ids)
    config, architecture = own_keys(file, name), ARCHITECTURES[name]
    for key, neutral in REFUSED.items():
        config.refuse_unless(key, *neutral)
    experts = _expert_count(config, architecture)
    layers, width = layer_count(config, file), config.integer("embedding_length")
    heads = uniform(config, "attention.head_count")
    d = head_dim(config, max(1, width // heads))
    context = config.integer("context_length")
    rope = make_rope(rope_parameters(config, context), d, context)
    try:
        spec = ModelSpec(
            architecture=architecture.experts if experts else architecture.dense,
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=uniform(config, "attention.head_count_kv", heads),
            head_dim=d,
            ffn_width=uniform(config, "feed_forward_length"),
            vocab=vocab(file),
            context=rope.context,
            norm_eps=config.number("attention.layer_norm_rms_epsilon"),
            tied_embeddings=gguf_name("output") not in file.tensors,
            qkv_bias=has(file, "q_bias"),
            output_bias=has(file, "o_bias"),
            ffn_bias=has(file, "gate_bias"),
            qk_norm=architecture.qk_norm,
            joint_qk_norm=architecture.joint_qk_norm,
            windows=_windows(config, name, layers, rope.context),
            experts=experts,
            active_experts=config.integer("expert_used_count") if experts else 0,
            expert_width=rows_of(file, "blk.0.ffn_gate_exps.weight") if experts else 0,
            shared_width=rows_of(file, gguf_name("layers.0.shared_gate")) if experts else 0,
            normalized_routing=experts > 0 and architecture.normalized,
            rope_theta=rope.theta,
            rope_scaling=rope.kind,
            rope_magnitude=rope.magnitude,
            bos_id=bos_id(file),
            eos_ids=tuple(eos_ids),
        )
    except ValueError as error:
        raise ConversionError(f"{config.where}: {error}; download the file again") from None
    layout = Layout(names=NAMES, layers=LAYERS, interleaved=architecture.interleaved)
    computed = {rope_name(GLOBAL_ROPE): divided(rope.frequencies, file)}
    return Decoder(spec, computed, Variant(layout=layout))


def _name(file: GgufFile) -> str:
    found = HfConfig(file.metadata, str(file.path))
    kind = found.text("general.type", "model")
    if kind != "model":
        raise NotAModelError(
            f"{file.path}: found a GGUF file of type {shown(kind)}, expected model; convert the model itself"
        )
    name = found.text("general.architecture")
    if name not in ARCHITECTURES and name not in DESCRIBED:
        known = ", ".join((*ARCHITECTURES, *DESCRIBED))
        raise UnsupportedError(
            f"{file.path}: found architecture {shown(name)}, expected one of {known}; "
            "convert a model of a supported architecture"
        )
    return name


def _expert_count(config: HfConfig, architecture: Architecture) -> int:
    """How many experts a layer has, 0 for none; refused for an architecture that is never so."""
    count = config.integer("expert_count", 0, least=0, most=MAX_EXPERTS)
    if bool(count) != bool(architecture.experts) and not (architecture.dense and architecture.experts):
        expected = "some" if architecture.experts else "none"
        raise UnsupportedError(
            f"{config.where}: found expert_count {count}, expected {expected} for this architecture; "
            "convert another model"
        )
    if count:
        config.refuse_unless("expert_weights_norm", architecture.normalized)
    return count


def _windows(config: HfConfig, name: str, layers: int, context: int) -> tuple[int, ...]:
    """Mistral's window, in every layer. Which layers of Qwen have one is not in the file."""
    size = config.integer("attention.sliding_window", 0, least=0)
    if size == 0 or size >= context:
        return ()
    if name != "llama":
        raise UnsupportedError(
            f"{config.where}: found attention.sliding_window {size} below the context of {context}, "
            "expected none, for the file does not say which layers have it; convert the Hugging Face folder"
        )
    return (size,) * layers
