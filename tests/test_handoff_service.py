"""The cloud half against edges of every kind: repeated, resumed, many, and gone."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import grpc
import pytest

import edgert
from edgert.handoff.certs import write_certificates
from edgert.handoff.handoff_pb2 import Draft, Rows, Sampling
from edgert.handoff.sessions import Limits
from edgert.handoff.setup import HandoffConfig
from edgert.handoff.states import EMPTY_CHAIN, Chain
from edgert.handoff.transport import Certificates
from edgert.handoff.wire import NAME
from tests.handoff_models import Files, Server, count, random_tokens, serving
from tests.handoff_raw import Raw, Text, hello, identity_of


@pytest.fixture(scope="module")
def files(handoff_files: Files) -> Files:
    return handoff_files


@pytest.fixture(scope="module")
def model(files: Files) -> str:
    return identity_of(files)


@pytest.fixture(scope="module")
def cloud(files: Files) -> Iterator[Server]:
    with serving(files.cloud) as server:
        yield server


@pytest.fixture
def raw(cloud: Server) -> Iterator[Callable[[], Raw]]:
    """Makes streams to the cloud half, and closes them."""
    with ExitStack() as made:
        yield lambda: made.enter_context(closing(Raw(cloud.address)))


# ---- order and repetition --------------------------------------------------------------------


def test_rows_are_acknowledged_and_questions_answered(
    files: Files, model: str, raw: Callable[..., Raw]
) -> None:
    text, stream = Text(files, "order"), raw()
    welcome = stream.send(hello=hello(model, b"order" + b"." * 11)).hear()
    assert (welcome.version, welcome.rows, welcome.context) == (1, 0, 64)
    assert stream.send(rows=text.rows(0, 5)).hear().rows == 5
    answer = stream.send(ask=text.ask(5)).hear()
    assert (answer.rows, answer.tokens[0].id, answer.layer_tokens) == (5, text.choices[4], 5)
    # A row at a time, and a question only at the end: all rows are computed then.
    for row in range(5, 9):
        assert stream.send(rows=text.rows(row, row + 1)).hear().rows == row + 1
    answer = stream.send(ask=text.ask(9)).hear()
    assert (answer.tokens[0].id, answer.layer_tokens) == (text.choices[8], 9)


def test_every_message_may_come_twice(files: Files, model: str, raw: Callable[..., Raw]) -> None:
    text, stream = Text(files, "twice"), raw()
    stream.send(hello=hello(model, b"twice" + b"." * 11)).hear()
    for _ in range(2):
        assert stream.send(rows=text.rows(0, 4)).hear().rows == 4
    assert stream.send(rows=text.rows(2, 6)).hear().rows == 6  # overlapping
    answers = [stream.send(ask=text.ask(6)).hear() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2] and answers[0].tokens[0].id == text.choices[5]


def test_rows_that_are_missing_are_asked_for(files: Files, model: str, raw: Callable[..., Raw]) -> None:
    text, stream = Text(files, "missing"), raw()
    stream.send(hello=hello(model, b"missing" + b"." * 9)).hear()
    assert stream.send(rows=text.rows(3, 6)).hear().rows == 0
    assert stream.send(rows=text.rows(0, 3)).hear().rows == 3
    assert stream.send(ask=text.ask(6)).hear().rows == 3  # asked before its rows came: the cloud holds 3
    assert stream.send(rows=text.rows(3, 6)).hear().rows == 6
    assert stream.send(ask=text.ask(6)).hear().tokens[0].id == text.choices[5]


def test_a_session_goes_on_over_another_stream(files: Files, model: str, raw: Callable[..., Raw]) -> None:
    text, name = Text(files, "resume"), b"resume" + b"." * 10
    first = raw()
    first.send(hello=hello(model, name)).hear()
    first.send(rows=text.rows(0, 7)).hear()
    answer = first.send(ask=text.ask(7)).hear()
    second = raw()  # the first was not closed: half open, as far as anybody knows
    said = hello(model, name, rows=7, prefix=text.chain.at(7))
    assert second.send(hello=said).hear().rows == 7
    assert second.send(ask=text.ask(7)).hear() == answer  # the answer was lost on its way: once more
    assert first.send(rows=text.rows(7, 8)).refusal()[0] == grpc.StatusCode.ABORTED
    # Only five of the rows hold; their answers are gone, and the last row is wanted again.
    third = raw()
    said = hello(model, name, rows=5, prefix=text.chain.at(5))
    assert third.send(hello=said).hear().rows == 5
    assert third.send(ask=text.ask(5)).hear().rows == 4
    assert third.send(rows=text.rows(4, 8)).hear().rows == 8
    assert third.send(ask=text.ask(8)).hear().tokens[0].id == text.choices[7]
    # And none of them: their hash is another.
    fourth = raw()
    assert fourth.send(hello=hello(model, name, rows=5, prefix=b"?" * 16)).hear().rows == 0


# ---- several tokens at once ------------------------------------------------------------------


def test_drafts_are_verified_as_plain_decoding_would(files: Files, model: str) -> None:
    with edgert.load(files.whole, threads=1) as whole:
        text = random_tokens("draft", 6, 80)
        right = list(whole.generate(text, max_tokens=12, temperature=1.3, seed=9).tokens)
    sampling = Sampling(temperature=1.3, top_p=1.0, repetition_penalty=1.0, seed=9)
    chain = Chain()
    with serving(files.whole) as server:
        stream = Raw(server.address)
        said = hello(model, layer=0, states=0, sampling=sampling, prompt=len(text))
        stream.send(hello=said).hear()
        rows, done = list(text), 0
        for token in rows:
            chain.append(token, b"")
        stream.send(rows=Rows(prefix=EMPTY_CHAIN, tokens=rows)).hear()
        for branch in (3, 0, 5):  # so many guesses of the right branch are right; others stand beside them
            guesses = [(right[done] + 1) % 80, *right[done : done + branch], 1]
            parents = [-1, -1, *range(1, branch), branch] if branch else [-1, -1]
            draft = Draft(
                rows=len(rows), prefix=chain.at(len(rows)), tokens=guesses, parents=parents[: len(guesses)]
            )
            found = [token.id for token in stream.send(draft=draft).hear().tokens]
            assert found[: branch + 1] == right[done : done + branch + 1]
            assert found == right[done : done + len(found)]
            again = [token.id for token in stream.send(draft=draft).hear().tokens]
            assert again == found
            for token in found:
                chain.append(token, b"")
            first = len(rows)
            rows += found
            done += len(found)
            # The edge sends what is now part of the text; the cloud has most of it already.
            sent = Rows(first=first, prefix=chain.at(first), tokens=found)
            assert stream.send(rows=sent).hear().rows == len(rows)
        stream.close()


# ---- many clients ----------------------------------------------------------------------------


@pytest.mark.compiled
def test_many_edges_at_once_get_what_each_would_alone(files: Files) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "seed": 3}
    prompts = [random_tokens(("many", n), 5 + n % 9, 80) for n in range(12)]
    with edgert.load(files.whole, threads=1) as whole:
        expected = [whole.generate(prompt, **options).tokens for prompt in prompts]
    with serving(files.cloud, sequences=12, chunk=32) as server:

        def generate(prompt: list[int]) -> tuple[int, ...]:
            config = HandoffConfig(cloud=server.address, deadline_s=60)
            with edgert.load(files.edge, threads=1, handoff=config) as model:
                return model.generate(prompt, **options).tokens

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(generate, prompts)) == expected
        forwards = count(server, "edgert_forward_rows_count")
    assert forwards < 12 * 12  # rows of several stood side by side


# ---- the server's life -----------------------------------------------------------------------


def test_health_tells_that_it_serves(cloud: Server) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(cloud.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            status = stub.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING


def test_clients_are_who_their_certificates_say(files: Files, model: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    write_certificates(tmp_path / "ours", ["localhost"], ["anna", "ben"], 1)
    write_certificates(tmp_path / "theirs", ["localhost"], ["eve"], 1)
    assert oct((tmp_path / "ours" / "anna.key").stat().st_mode)[-3:] == "600"
    server_side = Certificates.read(tmp_path / "ours", "server")
    with serving(
        files.cloud, host="localhost", certificates=server_side, limits=Limits(per_client=1)
    ) as server:
        streams = {}
        for name in ("anna", "ben"):
            channel = grpc.secure_channel(
                server.address, Certificates.read(tmp_path / "ours", name).channel()
            )
            streams[name] = Raw(server.address, channel)
            streams[name].send(hello=hello(model)).hear()  # the same session name: not the same session
        channel = grpc.secure_channel(server.address, Certificates.read(tmp_path / "ours", "anna").channel())
        code, details = Raw("", channel).send(hello=hello(model, b"second" + b"." * 10)).refusal()
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "client 'anna' holds 1" in details
        for folder, name in (("theirs", "eve"), (None, "")):
            stranger = grpc.insecure_channel(server.address)
            if folder is not None:
                theirs = Certificates.read(tmp_path / folder, name)
                ours = Certificates(server_side.authority, theirs.certificate, theirs.key)
                stranger = grpc.secure_channel(server.address, ours.channel())
            code, _ = Raw("", stranger).send(hello=hello(model)).refusal()
            assert code == grpc.StatusCode.UNAVAILABLE
        config = HandoffConfig(cloud=server.address, tls=tmp_path / "ours", client="anna", deadline_s=60)
        for stream in streams.values():
            stream.close()
        with edgert.load(files.edge, threads=1, handoff=config) as edge:
            given = list(edge.stream(random_tokens("tls", 5, 80), max_tokens=4))
        assert {e.source for e in given} == {"cloud"}


def test_a_server_that_is_told_to_end_drains_and_leaves(files: Files, model: str) -> None:
    """As a process, with a signal."""
    code = "import sys; from edgert.cli import main; main()"
    command = [sys.executable, "-c", code, "cloud", str(files.cloud), "--listen", "127.0.0.1:0", "-c", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "layers 2 to 3 of 3" in line and "no TLS" in line
            text, stream = Text(files, "drain"), Raw(line.split(" at ")[1].split(",")[0])
            stream.send(hello=hello(model)).hear()
            stream.send(rows=text.rows(0, 6)).hear()
            assert stream.send(ask=text.ask(6)).hear().tokens[0].id == text.choices[5]
            process.send_signal(signal.SIGTERM)
            code_, _ = stream.refusal()
            assert code_ in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            stream.close()
            assert process.wait(30) == 0
        finally:
            process.kill()
