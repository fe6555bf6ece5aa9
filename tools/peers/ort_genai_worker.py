"""onnxruntime-genai's process."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from .protocol import Runner, serve


class OrtGenaiRunner(Runner):
    """One Generator. It shows no rows but the last, so `rows` and `logits` are not offered."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        settings = json.loads((Path(file) / "genai_config.json").read_text())
        config = og.Config(file)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._weight_bytes = sum(p.stat().st_size for p in Path(file).glob("*.onnx*"))
        parameters = og.GeneratorParams(self._model)
        # min_length: random weights must not end the text at a token that happens to be the end's.
        parameters.set_search_options(max_length=context, min_length=context, do_sample=False)
        self._generator = og.Generator(self._model, parameters)
        super().__init__(settings["model"]["vocab_size"], context)

    def info(self) -> dict[str, Any]:
        """See Runner. All of the model's files: its embedding is kept apart from its output matrix."""
        return {"weight_bytes": self._weight_bytes, "version": og.__version__}

    @property
    def length(self) -> int:
        """See Runner."""
        return int(self._generator.token_count())

    def rewind(self, length: int) -> None:
        """See Runner."""
        self._generator.rewind_to(length)

    def feed(self, tokens: Sequence[int]) -> None:
        """See Runner."""
        self._generator.append_tokens(np.asarray([tokens], np.int32))

    def step(self, token: int) -> None:
        """See Runner; the token is the generator's own choice, there is no cheaper way to give one."""
        self._generator.generate_next_token()

    def tg(self, count: int, depth: int) -> float:
        """See Runner. The first call after a prompt only samples, so it comes before the clock."""
        before = max(depth, 1)
        self.reach(before - 1)
        self.feed(self.tokens[before - 1 : before])
        self._generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(count):
            self.step(0)
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(OrtGenaiRunner)
