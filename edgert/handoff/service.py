"""The cloud half's gRPC service: streams in, sessions and batches behind (docs/handoff.md)."""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from edgert.handoff.batches import Batches, Question
from edgert.handoff.handoff_pb2 import Ack, Answer, Ask, Draft, FromCloud, FromEdge, Resend, Rows, Welcome
from edgert.handoff.metrics import Metrics
from edgert.handoff.sessions import Limits, RefusedError, Session, Sessions, check_draft, check_hello
from edgert.handoff.wire import CLIENT_HEADER, KEY_HEADER, NAME, VERSION
from edgert.model.forward import Forward
from edgert.state import MAX_OUTPUTS

_log = logging.getLogger(__name__)

_CODES: Final = {
    "malformed": grpc.StatusCode.INVALID_ARGUMENT,
    "mismatch": grpc.StatusCode.FAILED_PRECONDITION,
    "too many": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "too large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "replaced": grpc.StatusCode.ABORTED,
    "draining": grpc.StatusCode.UNAVAILABLE,
    "internal": grpc.StatusCode.INTERNAL,
    "stranger": grpc.StatusCode.UNAUTHENTICATED,
}
_MOST_AHEAD: Final = 4096
"""Tokens one question may ask for. A longer answer than any context is a mistake."""


class Service:
    """Serves sessions of one model half. Made and used within one event loop."""

    def __init__(
        self,
        forward: Forward,
        model: str,
        tokenizer: str,
        limits: Limits,
        metrics: Metrics,
        gateway_key: str = "",
    ) -> None:
        self.metrics, self._gateway_key = metrics, gateway_key
        self._forward, self._limits = forward, limits
        self._model, self._tokenizer = model, tokenizer
        spec = forward.spec
        self._sessions = Sessions(forward.cache, spec.width, spec.vocab, limits)
        self._batches = Batches(forward, metrics)
        self._draining = False
        self._tasks = [asyncio.create_task(self._batches.work()), asyncio.create_task(self._tend())]

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server is given. Messages come as bytes, so that malformed ones are counted."""
        return grpc.method_handlers_generic_handler(
            NAME, {"Session": grpc.stream_stream_rpc_method_handler(self._session)}
        )

    async def drain(self, seconds: float) -> None:
        """Take no more streams and questions, and give the open questions up to so long to be answered."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + seconds
        while self._batches.open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """End the tasks; the forward is the caller's."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _session(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """One stream: a reader takes messages in, this generator sends what is put into its queue."""
        try:
            stream = _Stream(client_of(context, self._gateway_key))
        except RefusedError as refusal:
            self.metrics.refusals.labels(refusal.reason).inc()
            await context.abort(_CODES[refusal.reason], str(refusal))
        reader = asyncio.create_task(self._read(requests, stream))
        try:
            while isinstance(message := await stream.out.get(), FromCloud):
                data = message.SerializeToString()
                self.metrics.sent.inc(len(data))
                yield data
        finally:
            reader.cancel()
            if stream.session is not None and stream.session.stream is stream:
                self._batches.forget(stream.session)
                stream.session.stream = None
        if isinstance(message, RefusedError):
            self.metrics.refusals.labels(message.reason).inc()
            await context.abort(_CODES[message.reason], str(message))

    async def _read(self, requests: AsyncIterator[bytes], stream: "_Stream") -> None:
        try:
            # Closed at the end: gRPC's iterator holds the latest message, maybe a large one, in a cycle.
            async with contextlib.aclosing(aiter(requests)) as messages:  # type: ignore[type-var]
                async for data in messages:
                    await self._receive(data, stream)
            stream.out.put_nowait(None)
        except RefusedError as refusal:
            # Without the frames it came through, which hold the message too.
            stream.out.put_nowait(refusal.with_traceback(None))
        except Exception as error:  # a fault of ours ends this stream, not the server
            _log.exception("a stream failed")
            stream.out.put_nowait(RefusedError("internal", f"{type(error).__name__} in the cloud half"))

    async def _receive(self, data: bytes, stream: "_Stream") -> None:
        self.metrics.received.inc(len(data))
        if len(data) > self._limits.message_bytes:
            raise RefusedError(
                "too large", f"a message of {len(data)} bytes, expected at most {self._limits.message_bytes}"
            )
        try:
            message = FromEdge.FromString(data)
        except DecodeError:
            raise RefusedError(
                "malformed", f"a message of {len(data)} bytes that is none of this wire"
            ) from None
        kind = message.WhichOneof("kind")
        if self._draining:
            raise RefusedError("draining", "the cloud half is shutting down; try again")
        if stream.session is None or kind == "hello":
            await self._welcome(message, stream)
            return
        await self._batches.settled(stream.session)
        if stream.session.stream is not stream:
            raise RefusedError("replaced", "another stream speaks for this session now")
        if kind == "rows":
            self._take(message.rows, stream)
        elif kind == "ask":
            self._ask(message.ask, stream)
        elif kind == "draft":
            self._ask(message.draft, stream)
        else:
            raise RefusedError("malformed", "a message of no kind that this wire has")

    async def _welcome(self, message: FromEdge, stream: "_Stream") -> None:
        if stream.session is not None or message.WhichOneof("kind") != "hello":
            raise RefusedError("malformed", "expected one hello, as the first message of a stream")
        spec, hello = self._forward.spec, message.hello
        check_hello(hello, self._model, self._tokenizer, spec.first_layer, spec.layers)
        before = self._sessions.find(stream.client, hello.session)
        if before is not None:
            await self._batches.settled(before)
            self._batches.forget(before)
        stream.session = session = self._sessions.open(stream.client, hello, stream)
        stream.put(
            welcome=Welcome(
                version=VERSION,
                rows=session.rows,
                context=self._forward.cache.limit,
                message_bytes=self._limits.message_bytes,
            )
        )

    def _take(self, rows: Rows, stream: "_Stream") -> None:
        session = stream.known
        held = session.rows
        if self._sessions.accept(session, rows):
            self.metrics.rows.inc(session.rows - held)
            stream.put(ack=Ack(rows=session.rows))
        else:
            self._resend(stream)
        # A long prompt is computed while the rest of it comes; meanwhile its stream is not read, which
        # is what slows an edge down that sends faster than this computes.
        if len(session.waiting) >= self._forward.config.chunk:
            self._batches.fill(session)

    def _ask(self, question: Ask | Draft, stream: "_Stream") -> None:
        session, spec = stream.known, self._forward.spec
        self.metrics.questions.inc()
        more, guesses, parents = 0, (), ()
        if isinstance(question, Draft):
            check_draft(question, spec.vocab, min(MAX_OUTPUTS, self._forward.config.chunk) - 1)
            guesses, parents = tuple(question.tokens), tuple(question.parents)
        else:
            more = min(question.most, _MOST_AHEAD) - 1
        if session.layer > 0 and (guesses or more > 0):
            raise RefusedError("mismatch", "several tokens at once need a session whose layers are all here")
        found = self._sessions.recall(session, question)
        if found == "missing":
            self._resend(stream)
        elif isinstance(found, Answer):
            stream.put(answer=found)
        else:
            session.answers.clear()
            room = self._forward.cache.limit - session.rows
            if len(guesses) > room:
                raise RefusedError("too large", f"a draft of {len(guesses)} tokens with room for {room}")
            self._batches.ask(Question(session, stream.give, more, guesses, parents))

    def _resend(self, stream: "_Stream") -> None:
        self.metrics.resends.inc()
        stream.put(resend=Resend(rows=stream.known.rows))

    async def _tend(self) -> None:
        """Now and then: idle sessions lose their places, and gauges are set."""
        while True:
            await asyncio.sleep(0.05)
            self._sessions.evict_idle()
            waiting = self._sessions.waiting_bytes
            self.metrics.sessions.set(len(self._sessions))
            self.metrics.waiting.set(waiting)
            self.metrics.open.set(self._batches.open)
            self.metrics.count_evictions(self._sessions.evictions)


class _Stream:
    """One stream of one client: what is to be sent to it, and the session it speaks for."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.session: Session | None = None
        self.out: asyncio.Queue[FromCloud | RefusedError | None] = asyncio.Queue()

    @property
    def known(self) -> Session:
        assert self.session is not None
        return self.session

    def put(self, **kind: Any) -> None:
        """Send a message of one kind."""
        self.out.put_nowait(FromCloud(**kind))

    def give(self, answer: Answer | RefusedError) -> None:
        """Send an answer, or end the stream."""
        self.out.put_nowait(answer if isinstance(answer, RefusedError) else FromCloud(answer=answer))


def client_of(context: Any, gateway_key: str) -> str:
    """Who speaks: the common name in the client's certificate; without TLS (loopback only) "local".

    Behind a gateway (gateway.py) it is whom the gateway names, and nobody comes another way: RefusedError.
    """
    if gateway_key:
        told = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
        if not hmac.compare_digest(told.get(KEY_HEADER, "").encode(), gateway_key.encode()):
            raise RefusedError("stranger", "found a stream that did not come through the gateway")
        return told.get(CLIENT_HEADER, "")
    with contextlib.suppress(IndexError, UnicodeDecodeError):
        names: list[bytes] = context.auth_context().get("x509_common_name", [])
        return names[0].decode()
    return "local"
