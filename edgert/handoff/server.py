"""Runs a cloud half: the gRPC server around the service, its health, its signals, its end."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from edgert.errors import LinkError
from edgert.format import ErtFile
from edgert.format.identity import identity, tokenizer_identity
from edgert.handoff.metrics import Metrics
from edgert.handoff.service import Service
from edgert.handoff.sessions import Limits
from edgert.handoff.transport import FRAMING, OPTIONS, Address, Certificates, check_secure
from edgert.handoff.wire import NAME
from edgert.model.forward import Forward


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How a cloud half is served."""

    listen: Address
    certificates: Certificates | None = None
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 5.0  # for open questions, once it is asked to end
    gateway_key: str = ""  # who shows it speaks for others: a gateway, which names its clients


async def serve(
    file: ErtFile,
    forward: Forward,
    config: ServerConfig,
    ready: Callable[[int], None],
    metrics: Metrics,
) -> None:
    """Serve until SIGINT or SIGTERM, or until cancelled; `ready` is told the port.

    The first signal drains: no new questions, open ones are answered. Raises as `running` does.
    """
    async with running(file, forward, config, metrics) as port:
        ready(port)
        await until_told()


@contextlib.asynccontextmanager
async def running(
    file: ErtFile, forward: Forward, config: ServerConfig, metrics: Metrics
) -> AsyncIterator[int]:
    """A cloud half that serves meanwhile, and drains at the end; gives its port.

    Raises LinkError where the address is taken, OptionError for one that is open to others without
    certificates.
    """
    check_secure(config.listen, config.certificates)
    service = Service(
        forward, identity(file), tokenizer_identity(file), config.limits, metrics, config.gateway_key
    )
    _warm_up(forward)
    try:
        async with listening(
            service.handler(), config.listen, config.certificates, config.limits.message_bytes
        ) as (port, leave):
            yield port
            await leave()
            await service.drain(config.drain_s)
    finally:
        await service.close()


@contextlib.asynccontextmanager
async def listening(
    handler: grpc.GenericRpcHandler,
    listen: Address,
    certificates: Certificates | None,
    message_bytes: int,
) -> AsyncIterator[tuple[int, Callable[[], Awaitable[None]]]]:
    """A gRPC server with its health service; gives its port, and what says that it is about to end."""
    checks = health.aio.HealthServicer()
    own_port = ("grpc.so_reuseport", 0)  # a second server on the same port is an error, not a partner
    longest = ("grpc.max_receive_message_length", message_bytes + FRAMING)
    server = grpc.aio.server(options=[*OPTIONS, own_port, longest])
    server.add_generic_rpc_handlers((handler,))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    port = _bind(server, listen, certificates)
    await server.start()
    try:
        yield port, checks.enter_graceful_shutdown
    finally:
        await server.stop(0.5)


def _warm_up(forward: Forward) -> None:
    """Compile what is not compiled yet: a first client would wait for it longer than its deadline."""
    spec = forward.spec
    hidden = np.zeros((1, spec.width), np.float32) if spec.first_layer else None
    forward.run([0], layers=(spec.first_layer, spec.layers), hidden=hidden, outputs=[0])
    forward.cache.rewind(0)


def _bind(server: grpc.aio.Server, listen: Address, certificates: Certificates | None) -> int:
    try:
        if certificates is None:
            port: int = server.add_insecure_port(str(listen))
        else:
            port = server.add_secure_port(str(listen), certificates.server())
        return port
    except RuntimeError:
        raise LinkError(f"cannot listen on {listen}; choose a free port of this machine") from None


async def until_told() -> None:
    """Wait for SIGINT or SIGTERM."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Only the main thread may; tests run servers in others, and cancel them.
        with contextlib.suppress(RuntimeError, ValueError):
            loop.add_signal_handler(number, told.set)
    await told.wait()
