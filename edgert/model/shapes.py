"""Published model shapes by name, and random weights in them: for benchmarks that need no download."""

from pathlib import Path
from typing import Any

import numpy as np

from edgert.config import GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE, ModelSpec, Quant
from edgert.errors import OptionError
from edgert.format import ErtWriter, StoredTensor, declared
from edgert.format.layout import LAYOUT_OF, QUANTIZED, page_padded, stored_bytes
from edgert.kernels import packing
from edgert.kernels.neuron_packing import CLUSTER, NeuronShape
from edgert.state import Weights

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def _shape(
    architecture: str,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn_width: int,
    vocab: int,
    *,
    context: int = 32768,
    rope_theta: float = 500000.0,
    tied_embeddings: bool = True,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    **more: Any,
) -> ModelSpec:
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=ffn_width,
        vocab=vocab,
        context=context,
        norm_eps=1e-5,
        tied_embeddings=tied_embeddings,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_theta=rope_theta,
        **more,
    )


SHAPES: dict[str, ModelSpec] = {
    "qwen2.5-0.5b": _shape("qwen2", 24, 896, 14, 2, 64, 4864, 151936, qkv_bias=True, rope_theta=1e6),
    "prosparse-llama-2-7b": _shape(
        *("llama", 32, 4096, 32, 32, 128, 11008, 32000),
        context=4096,
        rope_theta=1e4,
        tied_embeddings=False,
        activation="relu",
        neurons=True,
    ),
    "llama-3.2-1b": _shape("llama", 16, 2048, 32, 8, 64, 8192, 128256),
    "llama-3.2-3b": _shape("llama", 28, 3072, 24, 8, 128, 8192, 128256),
    "qwen3-4b": _shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, qk_norm=True, rope_theta=1e6),
    "llama-3.1-8b": _shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, tied_embeddings=False),
    "gemma-3-1b": _shape(
        *("gemma3_text", 26, 1152, 4, 1, 256, 6912, 262144),
        rope_theta=1e6,
        qk_norm=True,
        activation="gelu_tanh",
        block="around",
        windows=(*((512,) * 5 + (0,)) * 4, 512, 512),
        ropes=(*((LOCAL_ROPE,) * 5 + (GLOBAL_ROPE,)) * 4, LOCAL_ROPE, LOCAL_ROPE),
    ),
    "phi-4-mini": _shape(
        *("phi3", 32, 3072, 24, 8, 128, 8192, 200064), context=4096, rope_theta=1e4, rotary=96
    ),
    "smollm3-3b": _shape(
        *("smollm3", 36, 2048, 16, 4, 128, 11008, 128256),
        rope_theta=5e6,
        ropes=(GLOBAL_ROPE, GLOBAL_ROPE, GLOBAL_ROPE, NO_ROPE) * 9,
    ),
    "olmoe-1b-7b": _shape(
        *("olmoe", 16, 2048, 16, 16, 128, 1024, 50304),
        context=4096,
        rope_theta=1e4,
        tied_embeddings=False,
        joint_qk_norm=True,
        experts=64,
        active_experts=8,
        expert_width=1024,
    ),
    "qwen3-30b-a3b": _shape(
        *("qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936),
        rope_theta=1e6,
        tied_embeddings=False,
        qk_norm=True,
        experts=128,
        active_experts=8,
        expert_width=768,
        normalized_routing=True,
    ),
    "gpt-oss-20b": _shape(
        *("gpt_oss", 24, 2880, 64, 8, 64, 2880, 201088),
        rope_theta=1.5e5,
        tied_embeddings=False,
        qkv_bias=True,
        output_bias=True,
        windows=(128, 0) * 12,
        sinks=True,
        experts=32,
        active_experts=4,
        expert_width=2880,
        normalized_routing=True,
        expert_biases=True,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    ),
    "deepseek-v2-lite": _shape(
        *("deepseek_v2", 27, 2048, 16, 1, 576, 10944, 102400),
        rope_theta=1e4,
        tied_embeddings=False,
        rotary=64,
        latent=512,
        plain_dim=128,
        value_dim=128,
        experts=64,
        active_experts=6,
        expert_width=1408,
        shared_width=2816,
        open_shared=True,
        dense_layers=(0,),
    ),
}


def shape(name: str) -> ModelSpec:
    """The shape called `name`; raises OptionError naming those there are."""
    if name not in SHAPES:
        raise OptionError(f"there is no shape {name!r}; there are: {', '.join(SHAPES)}")
    return SHAPES[name]


def parameters(spec: ModelSpec) -> int:
    """Weights of a model, without the rope frequencies (they are not trained)."""
    return sum(int(np.prod(d.shape)) for d in declared(spec) if not d.name.endswith("rope_frequencies"))


def planned(spec: ModelSpec, quant: Quant) -> tuple[dict[str, StoredTensor], int]:
    """Where each tensor of a model lies when all matrices have one precision, and the total size."""
    tensors, at = {}, 0
    for decl in declared(spec):
        kind = quant if decl.role in QUANTIZED else "f32"
        size = stored_bytes(decl.role, kind, decl.shape)
        layout = LAYOUT_OF[decl.role]
        tensors[decl.name] = StoredTensor(decl.name, decl.role, decl.shape, kind, layout, at, size, "")
        at += page_padded(size)
    return tensors, at


def random_weights(spec: ModelSpec, quant: Quant, seed: int = 0) -> Weights:
    """Random weights of a shape, scaled so that activations stay near 1 through all layers."""
    tensors, size = planned(spec, quant)
    data = np.zeros(size, np.uint8)
    fill = _Filler(spec, quant, seed)
    for tensor in tensors.values():
        fill(tensor, data[tensor.offset : tensor.offset + tensor.nbytes])
    return Weights(spec, data, tensors)


def write_random(path: Path, spec: ModelSpec, quant: Quant, seed: int = 0) -> None:
    """The weights of `random_weights` as a file without a tokenizer, one tensor in memory at a time."""
    tensors, _ = planned(spec, quant)
    fill = _Filler(spec, quant, seed)
    quants = {t.name: t.quant for t in tensors.values() if t.role in QUANTIZED}
    with ErtWriter(path, spec, quants, metadata={"source": "random weights"}) as writer:
        for tensor in tensors.values():
            view = np.zeros(tensor.nbytes, np.uint8)
            fill(tensor, view)
            writer.write(tensor.name, view)
        writer.finish()


class _Filler:
    """Writes random bytes of one tensor after the other."""

    def __init__(self, spec: ModelSpec, quant: Quant, seed: int) -> None:
        self._spec, self._quant = spec, quant
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.integers(0, 256, 1 << 20, dtype=np.uint8)

    def __call__(self, tensor: StoredTensor, view: Bytes) -> None:
        if tensor.name.endswith("rope_frequencies"):
            half = self._spec.rotated // 2
            view.view(np.float32)[:] = self._spec.rope_theta ** -(np.arange(half) / half)
        elif tensor.role == "vector":
            view.view(np.float32)[:] = 0.0 if tensor.name.endswith("_bias") else 1.0
        elif tensor.role == "router":
            # Not the repeated noise: rows that are equal would tie, and the same experts win every time.
            spread = np.float32(2 * tensor.shape[1] ** -0.5)
            rows = self._rng.standard_normal(tensor.shape, np.float32) * spread
            view[:] = packing.pack_floats(rows).reshape(-1)
        elif tensor.role == "neurons":
            _fill_neurons(view, self._quant, tensor.shape[-1], self._noise)
        else:
            _fill_matrix(view, self._quant, tensor.shape[-1], self._noise)


def _fill_matrix(
    view: Bytes,
    quant: Quant,
    columns: int,
    noise: Bytes,
) -> None:
    """Fill with `noise` repeated: a benchmark reads every byte, whatever it is."""
    size = packing.RECORD_BYTES[quant]
    records = view.reshape(-1, size)
    spread = columns**-0.5
    if quant in ("f32", "f16"):
        kind = np.float32 if quant == "f32" else np.float16
        values = (
            ((noise[: size * 64].astype(np.float32) - 127.5) * (spread / 74.0)).astype(kind).view(np.uint8)
        )
        view[:] = np.resize(values, view.size)
        return
    period = noise.size // size * size
    view[:] = np.resize(noise[:period], view.size)
    scale = np.float16(spread / _DEVIATION[quant])
    if quant in packing.BYTE_SCALED:
        records[:, -16:] = packing.scale_bytes(packing.byte_scales(np.array([scale])))
    else:
        at = 512 if quant == "q8" else 256
        records[:, at : at + 32].view(np.float16)[:] = scale
    if quant == "q4m":
        records[:, 288:].view(np.float16)[:] = -7.5 * scale


_DEVIATION = {"q8": 74.0, "q4m": 4.6, "q4": 4.6, "q4s": 4.6, "q3": 2.3, "q2": 1.1}
"""Of uniform numbers of 8, 4, 3 and 2 bits."""


def _fill_neurons(view: Bytes, quant: Quant, width: int, noise: Bytes) -> None:
    sizes, record = NeuronShape.of(quant, width), packing.RECORD_BYTES[quant]
    clusters = view.reshape(-1, sizes.cluster)
    clusters[:] = np.resize(noise, clusters.shape)
    scale = np.full(16, width**-0.5 / _DEVIATION[quant], np.float16)
    clusters[:, : sizes.scales] = np.resize(scale.view(np.uint8), sizes.scales)
    for neuron in range(CLUSTER):
        at = sizes.scales + neuron * (sizes.up + sizes.down)
        for end in range(at + record, at + sizes.up + 1, record):
            clusters[:, end - 32 : end] = scale.view(np.uint8)
