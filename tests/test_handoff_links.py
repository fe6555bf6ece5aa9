"""Weak links: whatever happens to a message, no wrong token, no hang, and every fallback marked."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgert
from edgert.events import TokenEvent
from edgert.handoff.certs import write_certificates
from edgert.handoff.setup import HandoffConfig
from edgert.handoff.transport import Certificates
from tests.handoff_faults import FAULTS, Fault, Plan, Relay
from tests.handoff_models import Files, Server, random_tokens, serving
from tests.test_handoff import check_against_one_pass

COUNT = 5
LENIENT: dict[str, Any] = {"deadline_s": 120.0}  # every fault but silence is overcome within it


@pytest.fixture(scope="module")
def files(handoff_files: Files) -> Files:
    return handoff_files


@pytest.fixture(scope="module")
def cloud(files: Files) -> Iterator[Server]:
    with serving(files.cloud) as server:
        yield server


@pytest.fixture(scope="module")
def relay(cloud: Server) -> Iterator[Relay]:
    with Relay(cloud.address) as made:
        yield made


def generate(path: Path, prompt: list[int], address: str, **config: Any) -> list[TokenEvent]:
    handoff = HandoffConfig(cloud=address, **config)
    with edgert.load(path, threads=1, chunk=8, handoff=handoff) as model:
        return list(model.stream(prompt, max_tokens=COUNT))


@pytest.mark.compiled
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_message_costs_time_and_no_token(
    files: Files, cloud: Server, relay: Relay, fault: Fault
) -> None:
    prompt = random_tokens("faults", 12, 80)
    with edgert.load(files.whole, threads=1) as whole:
        expected = list(whole.generate(prompt, max_tokens=COUNT).tokens)
    relay.plan = Plan()
    assert [e.token for e in generate(files.edge, prompt, relay.address, **LENIENT)] == expected
    messages = relay.plan.seen
    assert messages >= 4 * COUNT  # rows, a question, an acknowledgement and an answer for each token
    # A restart takes a second: after the hello, amid rows, at a question, at an answer.
    boundaries = {"restart": (0, 3, messages - 4, messages - 1), "silence": range(0, messages, 3)}.get(
        fault, range(messages)
    )
    for at in boundaries:

        def restart() -> None:
            cloud.stop()
            cloud.start()

        relay.plan = Plan(fault, at, restart)
        options = {"deadline_s": 0.2} if fault == "silence" else LENIENT
        given = generate(files.edge, prompt, relay.address, **options)
        assert relay.plan.struck == [at]
        if fault == "silence":
            check_marked(files, prompt, given)
        else:
            assert [e.token for e in given] == expected, at
            assert not any(e.fallback for e in given)


def check_marked(files: Files, prompt: list[int], given: list[TokenEvent]) -> None:
    """Tokens are the cloud's, or the exit's and say why; and each is right for what stands before it."""
    assert len(given) == COUNT
    for event in given:
        assert (event.source == "exit") == bool(event.fallback)
        assert event.fallback in ("", "deadline", "link")
    check_against_one_pass(files.whole, prompt, given)


def test_without_a_server_the_exit_answers_quickly_and_says_why(files: Files) -> None:
    prompt = random_tokens("nobody", 12, 80)
    with edgert.load(files.edge, handoff=HandoffConfig(cloud="127.0.0.1:1", deadline_s=0.5)) as model:
        stream = model.stream(prompt, max_tokens=COUNT)
        given = list(stream)
        stats = stream.completion().stats
    assert stats["fallbacks"] == COUNT and stats["exits"] == stats["handoffs"] == 0
    assert stats["link_wait_s"] < 0.5 * (COUNT - 1)  # two deadlines; after those nothing is waited for
    assert {e.fallback for e in given} == {"link"}
    check_marked(files, prompt, given)


@pytest.mark.compiled
def test_the_breaker_closes_when_the_server_returns(files: Files) -> None:
    prompt = random_tokens("return", 12, 80)
    server = Server(files.cloud)
    server.start()
    handoff = HandoffConfig(cloud=server.address, deadline_s=1.5)
    with edgert.load(files.edge, threads=1, handoff=handoff) as model:
        given: list[TokenEvent] = []
        stream = model.stream(prompt, max_tokens=50)
        given += [next(stream) for _ in range(4)]
        server.stop()
        given += [next(stream) for _ in range(6)]
        assert {e.fallback for e in given[:4]} == {""} and "link" in {e.fallback for e in given[4:]}
        waited = stream.completion().stats["link_wait_s"]
        given += [next(stream) for _ in range(3)]
        assert stream.completion().stats["link_wait_s"] - waited < 0.3  # the breaker is open: no waiting
        server.start()
        deadline = time.monotonic() + 20
        while given[-1].source != "cloud":
            assert time.monotonic() < deadline and len(given) < 48
            time.sleep(0.25)
            given.append(next(stream))
        given.append(next(stream))
        assert given[-1].source == "cloud"
    server.stop()
    # The cloud was sent all rows anew: what it answers follows from all tokens, the exit's among them.
    check_against_one_pass(files.whole, prompt, given)


def test_a_certificate_that_is_refused_leaves_the_exit_and_a_mark(files: Files, tmp_path: Path) -> None:
    write_certificates(tmp_path / "ours", ["localhost"], ["client"], 1)
    write_certificates(tmp_path / "theirs", ["localhost"], ["client"], 1)
    ours = Certificates.read(tmp_path / "ours", "server")
    with serving(files.cloud, host="localhost", certificates=ours) as server:
        prompt = random_tokens("refused", 6, 80)
        given = generate(files.edge, prompt, server.address, tls=tmp_path / "theirs", deadline_s=0.3)
        assert {e.fallback for e in given} == {"link"}
        given = generate(files.edge, prompt, server.address, tls=tmp_path / "ours", **LENIENT)
        assert {e.source for e in given} == {"cloud"}
