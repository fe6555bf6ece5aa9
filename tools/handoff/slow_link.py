"""A TCP relay with a link's round-trip time and bandwidth, for benchmarks on one machine."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

_PIECE = 1 << 14  # bytes passed on at once: 1.3 ms at 100 Mbit/s, so that both directions stay smooth


class SlowLink:
    """Listens on loopback and passes bytes on to `target`, late and no faster than the link.

    rtt_ms: round trip, half of it each way. mbit: bandwidth of each direction, shared by all connections;
    0 for none of either.
    """

    def __init__(self, target: str, rtt_ms: float, mbit: float) -> None:
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self._delay, self._rate = rtt_ms / 2000, mbit * 125_000
        self._free = [0.0, 0.0]  # when each direction has sent all it was given
        self._end: Callable[[], object] | None = None
        self._ready = threading.Event()
        self.address = ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "SlowLink":
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is not None:
            self._end()
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        self._end = lambda: loop.call_soon_threadsafe(stop.set)
        self._ready.set()
        await stop.wait()
        server.close()

    async def _connect(self, near: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        far, there = await asyncio.open_connection(self._host, self._port)
        pairs = ((near, there, 0), (far, out, 1))
        with contextlib.suppress(asyncio.CancelledError):  # the end of the relay, as good as any other
            await asyncio.wait([asyncio.create_task(self._pass(*pair)) for pair in pairs])

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: int) -> None:
        """Read at once, write when the bytes would have arrived."""
        arrivals: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await arrivals.get()
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                if not data:
                    break
                with contextlib.suppress(OSError):  # whoever reads has left
                    sink.write(data)
                    await sink.drain()
            sink.close()

        delivery = asyncio.create_task(deliver())
        try:
            while data := await source.read(_PIECE):
                begins = max(time.monotonic(), self._free[way])
                self._free[way] = begins + (len(data) / self._rate if self._rate else 0.0)
                arrivals.put_nowait((self._free[way] + self._delay, data))
        except OSError:
            pass
        arrivals.put_nowait((time.monotonic() + self._delay, b""))
        await delivery
