"""One address in front of several cloud halves: each session's streams go to one of them.

The gateway ends the edges' TLS, so it knows who they are, and passes messages on as they are, both ways, at
the pace of the slower side. It holds no state of a session. When the half that held one is gone, the edge's
stream breaks, the edge opens another as after any broken link, and the half it is led to now asks for the
rows again: nothing of the wire is different from one cloud half that was started anew.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from edgert.handoff.handoff_pb2 import FromEdge
from edgert.handoff.metrics import Metrics
from edgert.handoff.service import client_of
from edgert.handoff.transport import FRAMING, OPTIONS, Address, check_secure
from edgert.handoff.wire import CLIENT_HEADER, KEY_HEADER, METHOD, NAME

_log = logging.getLogger(__name__)

_ROUTE_S: Final = 10.0  # most time to find a replica: one that starts anew takes about as long

Route = Callable[[str], Awaitable[Address]]
"""Where the session of this name is served now. May raise anything where nobody can serve it."""


class Gateway:
    """Passes streams on to replicas. Made and used within one event loop.

    Replicas are on the same machine. key: what they know the gateway by (`ServerConfig.gateway_key`).
    """

    def __init__(self, route: Route, key: str, message_bytes: int, metrics: Metrics) -> None:
        self.metrics = metrics
        self._route, self._key = route, key
        self._options = [*OPTIONS, ("grpc.max_receive_message_length", message_bytes + FRAMING)]
        self._channels: dict[Address, grpc.aio.Channel] = {}
        self._draining = False

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server is given."""
        return grpc.method_handlers_generic_handler(
            NAME, {"Session": grpc.stream_stream_rpc_method_handler(self._session)}
        )

    def drain(self) -> None:
        """Take no more streams; those there are go on until their replicas end them."""
        self._draining = True

    async def close(self) -> None:
        """Close the channels to the replicas."""
        for channel in self._channels.values():
            await channel.close()

    async def _session(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """One stream of an edge, and the one to its replica."""
        client = client_of(context, "")
        if self._draining:
            await self._refuse(context, "draining", "the gateway is shutting down; try again")
        first = await anext(aiter(requests), None)
        if first is None:
            return
        try:
            address = await asyncio.wait_for(self._route(f"{client} {_session_of(first)}"), _ROUTE_S)
        except Exception as error:  # whatever the router ran into, this stream can come again
            _log.warning("no replica for a session: %s %s", type(error).__name__, error)
            await self._refuse(context, "no replica", "no replica can serve this now; try again")
        metadata = ((CLIENT_HEADER, client), (KEY_HEADER, self._key))
        call = self._channel(address).stream_stream(METHOD)(metadata=metadata)
        upward = asyncio.create_task(self._pass_up(first, requests, call))
        ended: grpc.aio.AioRpcError | None = None
        self.metrics.sessions.inc()
        try:
            async for data in call:
                self.metrics.sent.inc(len(data))
                yield data
        except grpc.aio.AioRpcError as error:
            ended = error
        finally:
            self.metrics.sessions.dec()
            upward.cancel()
            call.cancel()
        if ended is not None:
            await self._end(context, address, ended)

    async def _pass_up(self, first: bytes, requests: AsyncIterator[bytes], call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the way down tells why
            self.metrics.received.inc(len(first))
            await call.write(first)
            # Closed at the end, as in service.py: it holds the latest message.
            async with contextlib.aclosing(aiter(requests)) as messages:  # type: ignore[type-var]
                async for data in messages:
                    self.metrics.received.inc(len(data))
                    await call.write(data)
            await call.done_writing()

    async def _end(self, context: Any, address: Address, error: grpc.aio.AioRpcError) -> None:
        """End an edge's stream as its replica's ended."""
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            self._channels.pop(address, None)  # not closed: streams that drain may still be on it
            await self._refuse(context, "replica left", "the replica that held this session left; try again")
        await context.abort(error.code(), error.details())

    async def _refuse(self, context: Any, reason: str, text: str) -> None:
        self.metrics.refusals.labels(reason).inc()
        await context.abort(grpc.StatusCode.UNAVAILABLE, text)

    def _channel(self, address: Address) -> grpc.aio.Channel:
        if address not in self._channels:
            check_secure(address, None)
            self._channels[address] = grpc.aio.insecure_channel(str(address), self._options)
        return self._channels[address]


def _session_of(first: bytes) -> str:
    """The session that a stream's first message names; what is no hello is a replica's to refuse."""
    try:
        return bytes(FromEdge.FromString(first).hello.session).hex()
    except DecodeError:
        return ""
