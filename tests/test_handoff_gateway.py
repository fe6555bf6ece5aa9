"""Several cloud halves behind one address: a session stays with one, and moves on when that one is gone."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import edgert
from edgert.events import TokenEvent
from edgert.handoff.certs import write_certificates
from edgert.handoff.gateway import Gateway
from edgert.handoff.handoff_pb2 import FromEdge, Hello
from edgert.handoff.metrics import Metrics
from edgert.handoff.server import listening
from edgert.handoff.sessions import Limits
from edgert.handoff.setup import HandoffConfig
from edgert.handoff.transport import Address, Certificates
from edgert.handoff.wire import CLIENT_HEADER, KEY_HEADER, METHOD
from tests.handoff_models import Files, Server, count, random_tokens

KEY = "the gateway's"
PATIENT: dict[str, Any] = {"deadline_s": 60.0}  # on a busy machine nothing is to fall back


@pytest.fixture(scope="module")
def files(handoff_files: Files) -> Files:
    return handoff_files


class Gate:
    """A gateway in a thread of its own, and which replica each session was led to."""

    def __init__(self, replicas: list[Server], certificates: Certificates | None = None) -> None:
        self.replicas, self.certificates, self.metrics = replicas, certificates, Metrics()
        self.led: list[tuple[str, int]] = []
        self.gone: set[int] = set()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop, self._ready = asyncio.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(),), daemon=True
        )

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    async def _route(self, session: str) -> Address:
        left = [n for n in range(len(self.replicas)) if n not in self.gone]
        chosen = left[sum(session.encode()) % len(left)]
        self.led.append((session, chosen))
        return Address.parse(self.replicas[chosen].address)

    async def _run(self) -> None:
        gateway = Gateway(self._route, KEY, 1 << 20, self.metrics)
        listen = Address("localhost", 0)
        async with listening(gateway.handler(), listen, self.certificates, 1 << 20) as (self.port, _):
            self._ready.set()
            await self._stop.wait()
        await gateway.close()

    def __enter__(self) -> "Gate":
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()


@contextmanager
def gate(files: Files, number: int = 2, certificates: Any = None, **options: Any) -> Iterator[Gate]:
    replicas = [Server(files.cloud, gateway_key=KEY, **options) for _ in range(number)]
    for replica in replicas:
        replica.start()
    try:
        with Gate(replicas, certificates) as made:
            yield made
    finally:
        for replica in replicas:
            replica.stop()


def expected(files: Files, prompt: list[int], number: int) -> list[int]:
    with edgert.load(files.whole, threads=1) as whole:
        return list(whole.generate(prompt, max_tokens=number).tokens)


@pytest.mark.compiled
def test_a_session_moves_to_another_replica_and_no_token_is_wrong(files: Files) -> None:
    prompt = random_tokens("moves", 12, 80)
    with gate(files) as made:
        config = HandoffConfig(cloud=made.address, **PATIENT)
        given: list[TokenEvent] = []
        with edgert.load(files.edge, threads=1, handoff=config) as model:
            stream = model.stream(prompt, max_tokens=12)
            given += [next(stream) for _ in range(5)]
            ((_, first),) = made.led
            made.gone.add(first)
            made.replicas[first].stop()
            given += stream
            stats = stream.completion().stats
        assert {chosen for _, chosen in made.led[1:]} == {1 - first}
        assert [e.token for e in given] == expected(files, prompt, 12)
        assert {(e.source, e.fallback) for e in given} == {("cloud", "")}
        # The replica that is left was sent all rows, those of the prompt among them.
        assert count(made.replicas[1 - first], "edgert_rows_total") == 12 + 11
        assert stats["reconnects"] >= 1
        left = made.metrics.registry.get_sample_value("edgert_refusals_total", {"reason": "replica left"})
        assert left and left >= 1


@pytest.mark.compiled
def test_sessions_are_spread_and_each_stays_with_its_replica(files: Files) -> None:
    prompts = [random_tokens(("spread", n), 8, 80) for n in range(6)]
    with gate(files) as made:
        for prompt in prompts:
            config = HandoffConfig(cloud=made.address, **PATIENT)
            with edgert.load(files.edge, threads=1, handoff=config) as model:
                first = list(model.generate(prompt, max_tokens=3).tokens)
                longer = [*prompt, *first]
                done = model.generate(longer, max_tokens=3)
            assert [*first, *done.tokens] == expected(files, prompt, 6)
            # The second text of the session went where the first had been: only its new rows were sent.
            assert done.stats["bytes_up"] < 6 * 200
        names = dict(made.led)
        assert len(names) == 6 and set(names.values()) == {0, 1}
        assert all(names[session] == chosen for session, chosen in made.led)


@pytest.mark.compiled
def test_the_gateway_names_its_clients_and_nobody_else_is_let_in(files: Files, tmp_path: Path) -> None:
    write_certificates(tmp_path, ["localhost"], ["anna", "ben"], 1)
    server_side = Certificates.read(tmp_path, "server")
    with gate(files, 1, server_side, limits=Limits(per_client=1)) as made:
        models = {}
        for name in ("anna", "ben"):
            config = HandoffConfig(cloud=made.address, tls=tmp_path, client=name, **PATIENT)
            models[name] = edgert.load(files.edge, threads=1, handoff=config)
            given = list(models[name].stream(random_tokens(name, 5, 80), max_tokens=3))
            assert {e.source for e in given} == {"cloud"}
        config = HandoffConfig(cloud=made.address, tls=tmp_path, client="anna", deadline_s=0.5)
        with edgert.load(files.edge, threads=1, handoff=config) as second:
            done = second.generate(random_tokens("anna", 5, 80), max_tokens=2)
        assert done.stats["fallbacks"] == 2  # each has the one session it may have
        assert "client 'anna' holds 1 sessions" in done.stats["link_error"]
        for model in models.values():
            model.close()
        replica = made.replicas[0]
        for metadata in ((), ((CLIENT_HEADER, "anna"),), ((CLIENT_HEADER, "anna"), (KEY_HEADER, "a guess"))):
            hello = FromEdge(hello=Hello(version=1)).SerializeToString()
            with grpc.insecure_channel(replica.address) as channel, pytest.raises(grpc.RpcError) as error:
                next(channel.stream_stream(METHOD)(iter([hello]), metadata=metadata))
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "did not come through the gateway" in str(error.value.details())
        assert count(replica, "edgert_refusals_total", reason="stranger") == 3


def test_without_a_replica_the_exit_answers(files: Files) -> None:
    with gate(files, 1) as made:
        made.gone.add(0)  # the router raises
        config = HandoffConfig(cloud=made.address, deadline_s=0.3)
        with edgert.load(files.edge, threads=1, handoff=config) as model:
            done = model.generate([5, 6, 7], max_tokens=3)
    assert done.stats["fallbacks"] == 3
    assert "no replica can serve this now; try again" in done.stats["link_error"]
