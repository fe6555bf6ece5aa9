"""A relay between edges and a cloud half that does wrong what networks do wrong, message by message."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc

from edgert.handoff.wire import METHOD, NAME

Fault = Literal["", "cut", "delay", "twice", "swap", "silence", "restart"]
FAULTS: tuple[Fault, ...] = ("cut", "delay", "twice", "swap", "silence", "restart")
DELAY = 0.05  # seconds


@dataclass
class Plan:
    """Which fault befalls which message. Messages of both directions are counted together from 0."""

    fault: Fault = ""
    at: int = -1
    restart: Callable[[], None] | None = None
    seen: int = 0
    struck: list[int] = field(default_factory=list)

    def next(self) -> Fault:
        """The fault of the message that comes now."""
        index = self.seen
        self.seen += 1
        if index != self.at:
            return ""
        self.struck.append(index)
        return self.fault


class Relay:
    """A gRPC server that passes messages on to another, as the plan says."""

    def __init__(self, target: str) -> None:
        self.target, self.plan, self.port = target, Plan(), 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> "Relay":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()

    async def _serve(self) -> None:
        server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(self._session)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, {"Session": method}),))
        self.port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(0)

    async def _session(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async with grpc.aio.insecure_channel(self.target) as channel:
            call = channel.stream_stream(METHOD)()
            silent = asyncio.Event()  # a half-open link: nothing arrives any more, nobody is told

            async def up() -> None:
                async for data in self._damaged(requests, silent, call):
                    await call.write(data)

            async def down() -> None:
                async for data in self._damaged(call, silent, call):
                    await context.write(data)

            pumps = [asyncio.create_task(up()), asyncio.create_task(down())]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                if silent.is_set():
                    await asyncio.sleep(3600)  # until the edge gives up
            finally:
                for pump in pumps:
                    pump.cancel()
                results = await asyncio.gather(*pumps, return_exceptions=True)
                call.cancel()
            for error in results:
                if isinstance(error, grpc.aio.AioRpcError):
                    await context.abort(error.code(), error.details())
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def _damaged(
        self, messages: AsyncIterator[bytes], silent: asyncio.Event, call: Any
    ) -> AsyncIterator[bytes]:
        held: bytes | None = None
        async for data in messages:
            fault = self.plan.next()
            if fault == "silence":
                silent.set()
            if silent.is_set():
                continue
            if fault == "cut":
                return
            if fault == "restart" and self.plan.restart is not None:
                await asyncio.get_running_loop().run_in_executor(None, self.plan.restart)
            if fault == "delay":
                await asyncio.sleep(DELAY)
            if fault == "swap":
                held = data
                # One that nothing follows is late, not lost.
                try:
                    data = await asyncio.wait_for(anext(aiter(messages)), DELAY)
                except (asyncio.TimeoutError, StopAsyncIteration):
                    yield held
                    continue
            yield data
            if fault == "twice":
                yield data
            if held is not None:
                yield held
                held = None
