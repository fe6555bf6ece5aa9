"""Q4_0 files for llama.cpp, of random weights in a shape or of a Hugging Face folder's.

Runs in the peers' environment: python -m peers.gguf_models SPEC_JSON OUT [HF_FOLDER]
"""

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]
Source = Callable[[str, tuple[int, ...]], Array]
"""From a Hugging Face tensor name and its shape to float32 values."""

LAYER = (  # GGUF name, Hugging Face name
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
)


def tensors(spec: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """GGUF name, Hugging Face name and shape of every tensor."""
    width, head, ffn = spec["width"], spec["head_dim"], spec["ffn_width"]
    queries, keys = spec["heads"] * head, spec["kv_heads"] * head
    shapes = ((queries, width), (keys, width), (keys, width), (width, queries))
    yield "token_embd.weight", "model.embed_tokens.weight", (spec["vocab"], width)
    yield "output_norm.weight", "model.norm.weight", (width,)
    if not spec["tied_embeddings"]:
        yield "output.weight", "lm_head.weight", (spec["vocab"], width)
    for layer in range(spec["layers"]):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", (width,)
        yield f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", (width,)
        for (name, source), shape in zip(
            LAYER, (*shapes, (ffn, width), (ffn, width), (width, ffn)), strict=True
        ):
            yield f"{ours}.{name}.weight", f"{theirs}.{source}.weight", shape
            if spec["qkv_bias"] and name in ("attn_q", "attn_k", "attn_v"):
                yield f"{ours}.{name}.bias", f"{theirs}.{source}.bias", shape[:1]
        if spec["qk_norm"]:
            yield f"{ours}.attn_q_norm.weight", f"{theirs}.self_attn.q_norm.weight", (head,)
            yield f"{ours}.attn_k_norm.weight", f"{theirs}.self_attn.k_norm.weight", (head,)


def random_source() -> Source:
    """Matrices that keep activations near 1 through all layers; norms of 1, biases of 0."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        if len(shape) == 1:
            return np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
        values = rng.standard_normal(shape, np.float32)
        values *= 0.02 if "embed" in name else shape[1] ** -0.5
        return values

    return draw


def folder_source(folder: Path, spec: dict[str, Any]) -> Source:
    """The weights of a folder with one safetensors file."""
    file = safe_open(folder / "model.safetensors", "numpy")

    def read(name: str, shape: tuple[int, ...]) -> Array:
        values: Array = file.get_tensor(name).astype(np.float32)
        if values.shape != shape:
            raise ValueError(f"{name} has shape {values.shape}, expected {shape}")
        if spec["architecture"] == "llama" and ("q_proj" in name or "k_proj" in name):
            return interleaved(values, spec["head_dim"])
        return values

    return read


def interleaved(rows: Array, head_dim: int) -> Array:
    """Rows of q or k in llama.cpp's order for llama: rotary pairs side by side, not half a head apart."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(rows.shape))


def write_f16(path: Path, spec: dict[str, Any], source: Source) -> None:
    """A GGUF file without a tokenizer: matrices in float16, vectors in float32."""
    if spec["rope_scaling"] != "default":
        raise ValueError(f"rope scaling {spec['rope_scaling']!r} is not written here; expected the default")
    writer = gguf.GGUFWriter(path, spec["architecture"])
    writer.add_block_count(spec["layers"])
    writer.add_context_length(spec["context"])
    writer.add_embedding_length(spec["width"])
    writer.add_feed_forward_length(spec["ffn_width"])
    writer.add_head_count(spec["heads"])
    writer.add_head_count_kv(spec["kv_heads"])
    writer.add_key_length(spec["head_dim"])
    writer.add_value_length(spec["head_dim"])
    writer.add_layer_norm_rms_eps(spec["norm_eps"])
    writer.add_rope_dimension_count(spec["head_dim"])
    writer.add_rope_freq_base(spec["rope_theta"])
    writer.add_vocab_size(spec["vocab"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, original, shape in tensors(spec):
        values = source(original, shape)
        writer.add_tensor(name, values.astype(np.float16) if values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, target: Path) -> None:
    """Every matrix to Q4_0. By default llama.cpp would give the embedding and the output more bits."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.token_embedding_type = parameters.output_tensor_type = int(gguf.GGMLQuantizationType.Q4_0)
    parameters.pure = True
    names = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(parameters)):
        raise ValueError("llama.cpp cannot quantise the file it was given")


def check(path: Path) -> None:
    """Raise ValueError unless all matrices are Q4_0."""
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2 and tensor.tensor_type != gguf.GGMLQuantizationType.Q4_0:
            raise ValueError(f"{tensor.name} is {tensor.tensor_type.name}, expected Q4_0")


def main(spec_json: str, out: str, folder: str | None = None) -> None:
    """Write OUT; it has its name only when it is complete and checked."""
    spec, target = json.loads(spec_json), Path(out)
    source = folder_source(Path(folder), spec) if folder else random_source()
    whole, part = target.with_suffix(".f16"), target.with_suffix(".part")
    try:
        write_f16(whole, spec, source)
        quantize(whole, part)
        check(part)
        part.replace(target)
    finally:
        whole.unlink(missing_ok=True)
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
