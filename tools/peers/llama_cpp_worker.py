"""llama.cpp's process, through the C interface of llama-cpp-python."""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from .protocol import LogitsRunner, serve

MAX_ROWS = 64
PROMPT_BATCH = 2048  # llama.cpp's own default; it computes 512 rows of it at once
_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCppRunner(LogitsRunner):
    """One llama_context. Only the forward is timed: no sampler, no text, as in llama-bench."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise ValueError("llama.cpp cannot load the file")
        self._context = llama_cpp.llama_init_from_model(self._model, _parameters(threads, context))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self._batch = llama_cpp.llama_batch_init(MAX_ROWS, 0, 1)  # reused: filling one costs microseconds
        self._length, self._next = 0, 0
        super().__init__(self._vocab, context)

    def info(self) -> dict[str, Any]:
        """See Runner."""
        return {
            "weight_bytes": llama_cpp.llama_model_size(self._model),
            "version": f"{llama_cpp.__version__} (llama-cpp-python)",
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    @property
    def length(self) -> int:
        """See Runner."""
        return self._length

    def rewind(self, length: int) -> None:
        """See Runner."""
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise ValueError(f"llama.cpp cannot rewind to {length}")
        self._length = length

    def feed(self, tokens: Sequence[int]) -> None:
        """See Runner."""
        for start in range(0, len(tokens), PROMPT_BATCH):
            part = tokens[start : start + PROMPT_BATCH]
            ids = (llama_cpp.llama_token * len(part))(*part)
            self._decode(llama_cpp.llama_batch_get_one(ids, len(part)), len(part))

    def step(self, token: int) -> None:
        """See Runner."""
        self.batch([token])

    def batch(self, tokens: Sequence[int]) -> None:
        """See LogitsRunner."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row], batch.logits[row] = token, self._length + row, 1
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
        self._decode(batch, len(tokens))

    def last_logits(self) -> list[float]:
        """See LogitsRunner."""
        row = llama_cpp.llama_get_logits_ith(self._context, -1)
        return list(map(float, np.ctypeslib.as_array(row, (self._vocab,))))

    def start_greedy(self) -> None:
        """See LogitsRunner."""
        self.reach(0)
        self._next = self.tokens[0]

    def greedy(self) -> None:
        """See LogitsRunner."""
        self.step(self._next)
        self._next = llama_cpp.llama_sampler_sample(self._sampler, self._context, -1)

    def _decode(self, batch: llama_cpp.llama_batch, count: int) -> None:
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise ValueError(f"llama_decode gave {status} for {count} tokens behind {self._length}")
        llama_cpp.llama_synchronize(self._context)
        self._length += count


def _parameters(threads: int, context: int) -> llama_cpp.llama_context_params:
    values = llama_cpp.llama_context_default_params()
    values.n_ctx, values.n_batch = context, PROMPT_BATCH
    values.n_threads = values.n_threads_batch = threads
    return values


if __name__ == "__main__":
    serve(LlamaCppRunner)
