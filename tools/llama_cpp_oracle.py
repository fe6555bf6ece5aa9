"""llama.cpp's answers about GGUF files, for `check_gguf.py`: runs where llama-cpp-python is installed.

One JSON request per line on stdin, one JSON answer per line on stdout:

    {"do": "tokenize", "file": F, "texts": [...]}            the ids of each text, special tokens read
    {"do": "logits", "file": F, "tokens": [...], "out": NPY,
     "batch": B}                                              float32 [T, V], B tokens at a time
    {"do": "quantize", "file": F, "out": G, "type": "Q4_K_M"} writes G
"""

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np

_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


def _load(file: str, vocab_only: bool = False) -> Any:
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(file.encode(), parameters)
    if not model:
        raise ValueError(f"llama.cpp cannot load {file}")
    return model


def tokenize(file: str, texts: list[str]) -> list[list[int]]:
    """Ids with the special tokens the file asks for."""
    model = _load(file, vocab_only=True)
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = []
    for text in texts:
        data = text.encode()
        room = len(data) + 16
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, room, True, True)
        found.append(list(ids[:count]))
    llama_cpp.llama_model_free(model)
    return found


def logits(file: str, tokens: list[int], out: str, batch: int) -> None:
    """All rows of logits, computed `batch` tokens at a time."""
    model = _load(file)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = max(256, len(tokens))
    parameters.n_batch = parameters.n_ubatch = batch
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = np.empty((len(tokens), width), np.float32)
    slots = llama_cpp.llama_batch_init(batch, 0, 1)
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        slots.n_tokens = len(part)
        for i, token in enumerate(part):
            slots.token[i], slots.pos[i], slots.logits[i] = token, start + i, 1
            slots.n_seq_id[i], slots.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(context, slots):
            raise ValueError(f"llama.cpp cannot decode {file}")
        for i in range(len(part)):
            row = llama_cpp.llama_get_logits_ith(context, i)
            rows[start + i] = np.ctypeslib.as_array(row, (width,))
    np.save(out, rows)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def quantize(file: str, out: str, kind: str) -> None:
    """Rewrite a file of floats in another type."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(file.encode(), out.encode(), ctypes.byref(parameters)):
        raise ValueError(f"llama.cpp cannot quantise {file} to {kind}")


def answer(request: dict[str, Any]) -> Any:
    """What one request asks for."""
    match request["do"]:
        case "tokenize":
            return tokenize(request["file"], request["texts"])
        case "logits":
            return logits(request["file"], request["tokens"], request["out"], request["batch"])
        case "quantize":
            return quantize(request["file"], request["out"], request["type"])
        case other:
            raise ValueError(f"no such request: {other}")


if __name__ == "__main__":
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
