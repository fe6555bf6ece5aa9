"""A cloud half as several replicas of Ray Serve, behind one gateway (extra `cluster`).

Ray Serve starts the replicas, watches them, starts them anew and knows where they are; a session is led to
the replica its name hashes to. The messages themselves go from the gateway to the replica over gRPC: Serve's
own gRPC proxy has no TLS, and passes each message of a stream on as an actor call (docs/handoff.md).
"""

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.serve.config import ProxyLocation, RequestRouterConfig

from edgert.config import EngineConfig
from edgert.errors import DeviceError
from edgert.format import ErtFile
from edgert.handoff.gateway import Gateway
from edgert.handoff.metrics import Metrics
from edgert.handoff.server import ServerConfig, listening, running, until_told
from edgert.handoff.sessions import Limits
from edgert.handoff.transport import Address, Certificates, check_secure
from edgert.model.forward import Forward
from edgert.planner import cores
from edgert.state import Weights

_APPLICATION: Final = "edgert"
_ROUTER: Final = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_QUIET: Final = {"log_level": "ERROR", "enable_access_log": False}


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How a cloud half is served by several processes. All limits are each replica's own."""

    listen: Address
    replicas: int
    certificates: Certificates | None = None  # of the gateway: replicas serve on loopback
    limits: Limits = field(default_factory=Limits)
    drain_s: float = 5.0
    metrics: Address | None = None  # of the gateway; replica N answers at the port N + 1 behind it


async def serve_replicas(file: Path, engine: EngineConfig, config: ClusterConfig, ready: Any) -> None:
    """Serve until SIGINT or SIGTERM, as `server.serve` does; `ready` is told the gateway's port.

    Raises DeviceError where the cluster has too few cores or a replica does not start.
    """
    check_secure(config.listen, config.certificates)
    _start_ray(config, engine.threads)
    try:
        key = secrets.token_hex(16)
        handle = await asyncio.to_thread(_start_replicas, file, engine, config, key)
        gateway = _gateway(handle, config, key)
        try:
            async with listening(
                gateway.handler(), config.listen, config.certificates, config.limits.message_bytes
            ) as (port, leave):
                ready(port)
                await until_told()
                await leave()
                gateway.drain()
                await asyncio.to_thread(serve.shutdown)  # each replica drains
        finally:
            await gateway.close()
    finally:
        ray.shutdown()


class Replica:
    """One cloud half in a process of Ray's, with a port of its own."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it, in the loop the server is to run in
        self, file: Path, engine: EngineConfig, config: ClusterConfig, key: str
    ) -> None:
        metrics = Metrics()
        self._stack = contextlib.AsyncExitStack()
        opened = self._stack.enter_context(ErtFile.open(file))
        forward = Forward(Weights.of_file(opened), engine)
        self._stack.callback(forward.close)
        server = ServerConfig(Address("127.0.0.1", 0), None, config.limits, config.drain_s, key)
        port = await self._stack.enter_async_context(running(opened, forward, server, metrics))
        self._address = Address("127.0.0.1", port)
        if config.metrics is not None:
            rank = serve.get_replica_context().rank.rank
            metrics.serve(config.metrics.host, config.metrics.port + 1 + rank)

    async def address(self) -> Address:
        """Where it serves."""
        return self._address

    async def __del__(self) -> None:
        """Drain: Ray Serve calls and awaits this before it ends the process."""
        await self._stack.aclose()


def _start_ray(config: ClusterConfig, threads: int) -> None:
    wanted, found = config.replicas * threads, cores()
    if wanted > found:  # Ray would wait for them without an end
        raise DeviceError(
            f"{config.replicas} replicas of {threads} threads need {wanted} cores, and there are {found}; "
            "give fewer --replicas or --threads"
        )
    ray.init(
        address="local",  # a Ray of our own, whatever the environment says of others
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        # Ray's workers yield to all other processes (niceness 15) by default; these are the server.
        _system_config={"worker_niceness": 0},
    )


def _start_replicas(file: Path, engine: EngineConfig, config: ClusterConfig, key: str) -> Any:
    """The handle to replicas that serve; raises DeviceError where they do not start."""
    # Serve sets up a logger of its own for this process, where replicas that come and go are no news.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=_QUIET)
    deployment = serve.deployment(Replica).options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": engine.threads},
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        graceful_shutdown_timeout_s=config.drain_s + 5,
        max_constructor_retry_count=1,
        logging_config=_QUIET,
    )
    try:
        return serve.run(
            deployment.bind(file.absolute(), engine, replace(config, certificates=None), key),
            name=_APPLICATION,
            route_prefix=None,
            logging_config=_QUIET,
        )
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise DeviceError(f"the replicas did not start: {last}") from None


def _gateway(handle: Any, config: ClusterConfig, key: str) -> Gateway:
    metrics = Metrics()
    if config.metrics is not None:
        metrics.serve(config.metrics.host, config.metrics.port)

    async def route(session: str) -> Address:
        address: Address = await handle.options(session_id=session).address.remote()
        return address

    return Gateway(route, key, config.limits.message_bytes, metrics)
