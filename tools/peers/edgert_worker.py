"""edgert's process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgert import __version__
from edgert.config import SamplingParams
from edgert.devices.probe import STREAM_BYTES, StreamReader
from edgert.engine import Engine
from edgert.format import ErtFile
from edgert.planner import plan
from edgert.sampling import Sampler
from edgert.state import Weights

from .protocol import LogitsRunner, serve


class EdgertRunner(LogitsRunner):
    """One Engine; measurements drive its forward directly, as `edgert bench` does."""

    def __init__(self, file: str, threads: int, context: int) -> None:
        self._weights = Weights.of_file(ErtFile.open(Path(file)))
        config = plan(self._weights.spec, self._weights.size, threads=threads, context=context)
        super().__init__(self._weights.spec.vocab, context)
        self._engine = Engine(self._weights, config)
        self._forward = self._engine.forward
        self._sampler = Sampler(SamplingParams(), self._weights.spec.vocab)
        self._reader: StreamReader | None = None

    def info(self) -> dict[str, Any]:
        """See Runner. The embedding of an untied model counts as one row, that is, not at all."""
        read = [
            tensor.nbytes
            for tensor in self._weights.tensors.values()
            if tensor.role == "matrix"
            and (tensor.name != "token_embedding" or self._weights.spec.tied_embeddings)
        ]
        return {"weight_bytes": sum(read), "stream_bytes": STREAM_BYTES, "version": __version__}

    @property
    def length(self) -> int:
        """See Runner."""
        return self._forward.cache.length

    def rewind(self, length: int) -> None:
        """See Runner."""
        self._forward.cache.rewind(length)

    def feed(self, tokens: Sequence[int]) -> None:
        """See Runner."""
        size = self._forward.config.chunk
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            last = start + size >= len(tokens)
            self._last = self._forward.run(chunk, outputs=[len(chunk) - 1] if last else [])

    def step(self, token: int) -> None:
        """See Runner."""
        self._forward.run([token], outputs=[0])

    def batch(self, tokens: Sequence[int]) -> None:
        """See LogitsRunner."""
        self._last = self._forward.run(tokens, outputs=range(len(tokens)))

    def last_logits(self) -> list[float]:
        """See LogitsRunner."""
        return list(map(float, self._last[-1]))

    def start_greedy(self) -> None:
        """See LogitsRunner."""
        self._engine.start(self.tokens[:1], self._sampler)

    def greedy(self) -> None:
        """See LogitsRunner."""
        self._engine.step()

    def stream(self) -> float:
        """Seconds to read STREAM_BYTES with as many threads as the engine has."""
        if self._reader is None:
            self._reader = StreamReader(self._forward.config.threads)
        return self._reader.seconds() * STREAM_BYTES / self._reader.nbytes


if __name__ == "__main__":
    serve(EdgertRunner)
