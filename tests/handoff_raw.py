"""One stream of the wire, message by message, and the rows to send over it."""

import queue
from typing import Any

import grpc
import pytest

from edgert.config import EngineConfig
from edgert.format import ErtFile
from edgert.format.identity import identity
from edgert.handoff.handoff_pb2 import Ask, FromCloud, FromEdge, Hello, Rows, Sampling
from edgert.handoff.states import EMPTY_CHAIN, Chain, encode
from edgert.handoff.wire import METHOD
from edgert.model.forward import Forward
from edgert.state import Weights
from tests.handoff_models import LAYER, Files, random_tokens

GREEDY = Sampling(top_p=1.0, repetition_penalty=1.0)


def identity_of(files: Files) -> str:
    """What an edge calls the model in its hello."""
    with ErtFile.open(files.whole) as file:
        return identity(file)


class Raw:
    """One stream, message by message."""

    def __init__(self, address: str, channel: Any = None) -> None:
        self.channel = channel or grpc.insecure_channel(address)
        self._out: queue.Queue[bytes | None] = queue.Queue()
        self._call = self.channel.stream_stream(METHOD)(iter(self._out.get, None))

    def send(self, data: bytes | None = None, **kind: Any) -> "Raw":
        self._out.put(FromEdge(**kind).SerializeToString() if data is None else data)
        return self

    def hear(self) -> Any:
        message = FromCloud.FromString(next(self._call))
        return getattr(message, str(message.WhichOneof("kind")))

    def refusal(self) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as error:
            while True:
                next(self._call)
        return error.value.code(), str(error.value.details())

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()
        self.channel.close()


class Text:
    """A sequence of tokens with its hidden rows, as an edge computes them, and the whole model's choices."""

    def __init__(self, files: Files, label: object, length: int = 12) -> None:
        self.tokens = random_tokens(label, length, 80)
        with ErtFile.open(files.whole) as file:
            forward = Forward(Weights.of_file(file), EngineConfig(1, 64, 64))
            try:
                hidden = forward.run(self.tokens, layers=(0, LAYER)).copy()
                logits = forward.run(self.tokens, layers=(LAYER, 3), outputs=range(length)).copy()
            finally:
                forward.close()
        self.choices = [int(i) for i in logits.argmax(axis=1)]
        self.states = [encode("f32", hidden[i : i + 1]) for i in range(length)]
        self.chain = Chain()
        for token, state in zip(self.tokens, self.states, strict=True):
            self.chain.append(token, state)

    def rows(self, first: int, last: int) -> Rows:
        states = b"".join(self.states[first:last])
        return Rows(first=first, prefix=self.chain.at(first), tokens=self.tokens[first:last], states=states)

    def ask(self, rows: int) -> Ask:
        return Ask(rows=rows, prefix=self.chain.at(rows))


def hello(of: str, name: bytes = b"x" * 16, **fields: Any) -> Hello:
    known: dict[str, Any] = {"version": 1, "session": name, "model": of, "layer": LAYER, "states": 1}
    return Hello(**(known | {"sampling": GREEDY, "prompt": 4, "prefix": EMPTY_CHAIN} | fields))
