"""Runs a cloud half: the gRPC server around the service, its health, its signals, its end."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
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


async def serve(
    file: ErtFile,
    forward: Forward,
    config: ServerConfig,
    ready: Callable[[int], None],
    metrics: Metrics,
) -> None:
    """Serve until SIGINT or SIGTERM, or until cancelled; `ready` is told the port.

    The first signal drains: no new questions, open ones are answered. Raises LinkError where the address
    is taken, OptionError for one that is open to others without certificates.
    """
    check_secure(config.listen, config.certificates)
    service = Service(forward, identity(file), tokenizer_identity(file), config.limits, metrics)
    checks = health.aio.HealthServicer()
    server = grpc.aio.server(
        options=[*OPTIONS, ("grpc.max_receive_message_length", config.limits.message_bytes + FRAMING)]
    )
    server.add_generic_rpc_handlers((service.handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    _warm_up(forward)
    port = _bind(server, config)
    await server.start()
    try:
        ready(port)
        await _until_told()
        await checks.enter_graceful_shutdown()
        await service.drain(config.drain_s)
    finally:
        await server.stop(0.5)
        await service.close()


def _warm_up(forward: Forward) -> None:
    """Compile what is not compiled yet: a first client would wait for it longer than its deadline."""
    spec = forward.spec
    hidden = np.zeros((1, spec.width), np.float32) if spec.first_layer else None
    forward.run([0], layers=(spec.first_layer, spec.layers), hidden=hidden, outputs=[0])
    forward.cache.rewind(0)


def _bind(server: grpc.aio.Server, config: ServerConfig) -> int:
    try:
        if config.certificates is None:
            port: int = server.add_insecure_port(str(config.listen))
        else:
            port = server.add_secure_port(str(config.listen), config.certificates.server())
        return port
    except RuntimeError:
        raise LinkError(f"cannot listen on {config.listen}; choose a free port of this machine") from None


async def _until_told() -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Only the main thread may; tests run servers in others, and cancel them.
        with contextlib.suppress(RuntimeError, ValueError):
            loop.add_signal_handler(number, told.set)
    await told.wait()
