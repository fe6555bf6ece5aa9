"""The edge's side of the wire: rows go up in the background, questions wait for answers.

One thread keeps one stream open, for as long as the link lives. When the stream breaks, the thread makes
another and goes on from the row the cloud says it holds. What the edge wants said is state, not a queue:
which rows there are, and which question is open; a stream sends what the cloud lacks of it.
"""

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from edgert.errors import LinkError
from edgert.handoff.handoff_pb2 import STATES_NONE, Ask, Draft, FromCloud, FromEdge, Hello, Rows, Sampling
from edgert.handoff.states import Chain, Wire, encode, row_bytes
from edgert.handoff.transport import OPTIONS, Address, Certificates, check_secure, plain_reason
from edgert.handoff.upper import Failure
from edgert.handoff.wire import METHOD, STATES_OF, VERSION, read_choice, sampling_message
from edgert.sampling import Choice, Sampler

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
"""Seconds between attempts to reach the cloud, doubled each time: a restart is bridged within a token's
deadline, and a dead server costs a board one packet every few seconds."""
_MISSES: Final = 2  # unanswered questions in a row after which the link counts as down
_WELCOME_S: Final = 3.0  # a server that takes the stream but says nothing for so long is not there
_HEADROOM: Final = 1 << 12  # bytes of a message beside its hidden values
_MOST_ROWS: Final = 256  # of one message: acknowledged at least so often
_FATAL: Final = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
)


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """Which cloud, and how to talk to it."""

    address: Address
    certificates: Certificates | None = None
    wire: Wire = "f32"
    deadline_s: float = 2.0  # a question's answer is waited for so long


@dataclass(eq=False)
class _Stream:
    """What one stream has said and heard so far."""

    epoch: int
    up: bool = False  # welcomed
    over: bool = False
    sent: int = 0  # rows
    asked: int = 0  # rows behind which tokens were asked for, and not to be asked again; 0: none
    most_rows: int = 1  # of one message


class Link:
    """One edge's session with a cloud half. Used by one thread; close it after use.

    layer: where the rows enter the cloud's layers; 0 sends tokens alone, to a cloud with all layers.
    """

    def __init__(self, config: LinkConfig, model: str, layer: int, width: int, vocab: int) -> None:
        check_secure(config.address, config.certificates)
        self._config, self._model, self._layer = config, model, layer
        self._width, self._vocab = width, vocab
        self._state = threading.Condition()  # guards all that follows
        self._session = secrets.token_bytes(16)
        self._sampling, self._prompt = Sampling(), 0
        self._tokens: list[int] = []
        self._states: list[bytes] = []
        self._chain = Chain()
        self._held = 0  # rows of the session that the cloud acknowledged
        self._question: tuple[int, FromEdge] | None = None  # (rows, message), while one waits
        self._answers: dict[int, list[Choice]] = {}  # by the rows they follow
        self._epoch = 0  # the sequence; 0: none has begun
        self._stream = _Stream(0)
        self._call: Any = None
        self._misses = 0
        self._down = False  # the breaker is open: nothing is waited for until a stream is welcomed
        self._refused = ""  # for good
        self._error = ""  # the latest
        self._closed = False
        self._counted = 0  # layer tokens of the session, when last told
        self.bytes_up = self.bytes_down = self.layer_tokens = self.reconnects = 0
        self.wait_s = 0.0
        self._thread = threading.Thread(target=self._keep_open, daemon=True, name="edgert-link")
        self._thread.start()

    def begin(self, keep: int, sampler: Sampler, prompt: int) -> None:
        """Begin a sequence whose first `keep` rows are those of the one before; `prompt` tokens are given."""
        with self._state:
            del self._tokens[keep:], self._states[keep:]
            self._chain.cut(keep)
            self._held = min(self._held, keep)
            self._sampling = sampling_message(sampler)
            self._prompt = prompt
            self._question, self._answers = None, {}
            self.bytes_up = self.bytes_down = self.layer_tokens = self.reconnects = 0
            self.wait_s = 0.0
            self._epoch += 1
            self._end_call()
            self._state.notify_all()

    def push(self, first: int, tokens: Sequence[int], hidden: NDArray[np.float32] | None) -> None:
        """Rows from number `first` on, with hidden values [T, D] unless the cloud has all layers.

        Rows that were pushed before are not taken again: an interrupted step may repeat them.
        """
        size = 0 if hidden is None else row_bytes(self._config.wire, self._width)
        data = b"" if hidden is None else encode(self._config.wire, hidden)
        with self._state:
            for index in range(len(self._tokens) - first, len(tokens)):
                state = data[index * size : (index + 1) * size]
                self._tokens.append(tokens[index])
                self._states.append(state)
                self._chain.append(tokens[index], state)
            self._state.notify_all()

    @property
    def error(self) -> str:
        """Why there was no answer the last time; empty where there always was one."""
        return self._refused or self._error

    @property
    def rows(self) -> int:
        """Rows pushed of this sequence."""
        return len(self._tokens)

    def ask(
        self, rows: int, most: int = 1, guesses: Sequence[int] = (), parents: Sequence[int] = ()
    ) -> list[Choice] | Failure:
        """The token after `rows` rows, which were pushed; with guesses, as many as hold and one more.

        most: how far the cloud may go on by itself; later calls find those answers waiting.
        """
        began = time.perf_counter()
        with self._state:
            try:
                return self._wait_for(rows, most, guesses, parents)
            finally:
                self._question = None
                self.wait_s += time.perf_counter() - began

    def close(self) -> None:
        """End the stream and the thread."""
        with self._state:
            self._closed = True
            self._end_call()
            self._state.notify_all()
        self._thread.join(5)

    # ---- questions, in the caller's thread --------------------------------------------------------

    def _wait_for(
        self, rows: int, most: int, guesses: Sequence[int], parents: Sequence[int]
    ) -> list[Choice] | Failure:
        prefix = self._chain.at(rows)
        self._answers = {at: found for at, found in self._answers.items() if at >= rows}
        if guesses:
            message = FromEdge(draft=Draft(rows=rows, prefix=prefix, tokens=guesses, parents=parents))
        else:
            message = FromEdge(ask=Ask(rows=rows, prefix=prefix, most=most))
        if rows not in self._answers and not self._down:
            self._question = rows, message
            self._state.notify_all()
            self._state.wait_for(
                lambda: rows in self._answers or bool(self._refused), self._config.deadline_s
            )
        if rows in self._answers:
            self._misses = 0
            return self._answers.pop(rows)
        if self._refused:
            return Failure("refused", self._refused)
        if self._down:
            return Failure("link", self._error or f"{self._config.address} does not answer")
        return self._missed()

    def _missed(self) -> Failure:
        up = self._stream.up
        self._misses += 1
        if self._misses >= _MISSES:
            # It may be half open: packets go out and nothing comes back. Only a new connection tells.
            self._down = True
            self._end_call()
        if up:
            self._error = f"{self._config.address}: no answer within {self._config.deadline_s:g} s"
            return Failure("deadline", self._error)
        return Failure("link", self._error or f"{self._config.address} does not answer")

    def _end_call(self) -> None:
        self._stream.over = True
        if self._call is not None:
            self._call.cancel()

    # ---- the stream, in its own thread ------------------------------------------------------------

    def _keep_open(self) -> None:
        channel: grpc.Channel | None = None
        pause = _FIRST_PAUSE
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or (self._epoch > 0 and not self._refused))
                if self._closed:
                    break
                self._stream = stream = _Stream(self._epoch)
            channel = channel or self._open_channel()
            code, text = self._run(channel, stream)
            with self._state:
                if self._closed:
                    break
                if stream.epoch != self._epoch:
                    continue  # another sequence began: at once, over the same connection
                self._note_end(stream, code, text)
            channel.close()
            channel = None
            with self._state:
                pause = _FIRST_PAUSE if stream.up else min(pause * 2, _LONGEST_PAUSE)
                wake = pause * random.uniform(0.5, 1.0)  # not all edges at once after a restart
                self._state.wait_for(self._has_news(stream), wake)
        if channel is not None:
            channel.close()

    def _has_news(self, stream: _Stream) -> Callable[[], bool]:
        return lambda: self._closed or stream.epoch != self._epoch

    def _note_end(self, stream: _Stream, code: grpc.StatusCode, text: str) -> None:
        self.reconnects += 1
        self._error = text
        if code in _FATAL and not stream.up:
            self._refused = text
        elif code in _FATAL:  # what the cloud holds is not ours: start anew
            self._session, self._held = secrets.token_bytes(16), 0
        self._state.notify_all()

    def _run(self, channel: grpc.Channel, stream: _Stream) -> tuple[grpc.StatusCode, str]:
        """One stream, from hello to its end; why it ended."""
        call = channel.stream_stream(METHOD)(self._outgoing(stream))
        with self._state:
            self._call = call
            if stream.over:
                call.cancel()
        silence = threading.Timer(_WELCOME_S, self._give_up, (stream, call))
        silence.daemon = True
        silence.start()
        try:
            for data in call:
                self._hear(stream, data)
            return grpc.StatusCode.OK, "the cloud ended the stream"
        except grpc.RpcError as error:
            details = error.details() or error.code().name.lower()
            reason = plain_reason(details, self._config.certificates is not None)
            return error.code(), f"{self._config.address}: {reason}"
        except LinkError as error:
            call.cancel()
            return grpc.StatusCode.DATA_LOSS, f"{self._config.address}: {error}"
        finally:
            silence.cancel()
            with self._state:
                stream.over, self._call = True, None
                self._state.notify_all()

    def _open_channel(self) -> grpc.Channel:
        options = [*OPTIONS, ("grpc.max_reconnect_backoff_ms", 1000)]
        address, certificates = str(self._config.address), self._config.certificates
        if certificates is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, certificates.channel(), options)

    def _give_up(self, stream: _Stream, call: Any) -> None:
        with self._state:
            if not stream.up:
                call.cancel()

    def _outgoing(self, stream: _Stream) -> Iterator[bytes]:
        """What this stream has to say, as it comes up; gRPC takes it when the link has room."""
        states = STATES_OF[self._config.wire] if self._layer else STATES_NONE
        with self._state:
            rows = self._held
            hello = Hello(
                version=VERSION,
                session=self._session,
                model=self._model,
                layer=self._layer,
                states=states,
                sampling=self._sampling,
                prompt=self._prompt,
                rows=rows,
                prefix=self._chain.at(rows),
            )
        message: FromEdge | None = FromEdge(hello=hello)
        while message is not None:
            data = message.SerializeToString()
            with self._state:
                self.bytes_up += len(data)
            yield data
            with self._state:
                self._state.wait_for(lambda: stream.over or (stream.up and self._has_more(stream)))
                message = None if stream.over else self._next(stream)

    def _has_more(self, stream: _Stream) -> bool:
        if stream.sent < len(self._tokens):
            return True
        return self._question is not None and stream.asked < self._question[0]

    def _next(self, stream: _Stream) -> FromEdge:
        """Rows the cloud lacks, before the question about them."""
        first = stream.sent
        last = min(len(self._tokens), first + stream.most_rows)
        if first == last:
            assert self._question is not None
            rows, message = self._question
            stream.asked = rows + max(message.ask.most, 1) - 1
            return message
        stream.sent = last
        states = b"".join(self._states[first:last])
        prefix = self._chain.at(first)
        return FromEdge(rows=Rows(first=first, prefix=prefix, tokens=self._tokens[first:last], states=states))

    def _hear(self, stream: _Stream, data: bytes) -> None:
        try:
            message = FromCloud.FromString(data)
        except DecodeError:
            raise LinkError("the cloud sent something that is none of this wire") from None
        kind = message.WhichOneof("kind")
        with self._state:
            self.bytes_down += len(data)
            if stream.over:
                return
            if kind == "welcome":
                welcome = message.welcome
                if welcome.version != VERSION or welcome.rows > len(self._tokens):
                    raise LinkError(
                        f"the cloud speaks version {welcome.version} and holds {welcome.rows} rows"
                    )
                size = max(1, row_bytes(self._config.wire, self._width) if self._layer else 8)
                most = (welcome.message_bytes - _HEADROOM) // size
                stream.most_rows = max(1, min(most, _MOST_ROWS))
                stream.up, stream.sent, self._held = True, welcome.rows, welcome.rows
                self._down, self._misses = False, 0
            elif kind == "ack":
                self._held = min(message.ack.rows, len(self._tokens))
            elif kind == "resend":
                self._held = min(self._held, message.resend.rows)
                stream.sent, stream.asked = min(stream.sent, message.resend.rows), 0
            elif kind == "answer":
                choices = [read_choice(token, self._vocab) for token in message.answer.tokens]
                self._count_layers(message.answer.layer_tokens)
                if choices:
                    self._answers[message.answer.rows] = choices
            self._state.notify_all()

    def _count_layers(self, total: int) -> None:
        """The cloud counts for as long as it holds the session; what is new belongs to this sequence."""
        self.layer_tokens += total - self._counted if total >= self._counted else total
        self._counted = total
