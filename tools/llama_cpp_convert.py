"""llama.cpp's two steps from a Hugging Face folder to a quantised file, for `bench_convert.py`.

    python tools/llama_cpp_convert.py copy FOLDER OUT.gguf         a Llama in bfloat16, as it is
    python tools/llama_cpp_convert.py quantize IN.gguf OUT.gguf Q4_K_M

Needs llama-cpp-python and gguf. The first stands in for the repository's convert_hf_to_gguf.py: it writes the
same file but for the vocabulary, which quantising does not read.
"""

import ctypes
import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def copy(folder: Path, out: Path) -> None:
    """Every tensor as it is, but norms in float32 and the rows of q and k in llama.cpp's order."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for source, entry in header.items():
        begin, end = entry["data_offsets"]
        words = np.memmap(path, "<u2", "r", 8 + length + begin, ((end - begin) // 2,)).reshape(entry["shape"])
        name = named(source)
        if words.ndim == 1:
            writer.add_tensor(name, (words.astype(np.uint32) << 16).view(np.float32))
            continue
        if "q_proj" in source or "k_proj" in source:
            rows = words.reshape(-1, 2, config["head_dim"] // 2, words.shape[1]).swapaxes(1, 2)
            words = np.ascontiguousarray(rows).reshape(words.shape)
        writer.add_tensor(name, words.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named(source: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, kind = source.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{TOP[stem]}.{kind}"
    index, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{LAYER[part]}.{kind}"


def quantize(source: str, out: str, kind: str) -> None:
    """llama.cpp's own quantiser, on as many threads as it takes by itself."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")


if __name__ == "__main__":
    if sys.argv[1] == "copy":
        copy(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        llama_cpp.llama_backend_init()
        quantize(*sys.argv[2:])
