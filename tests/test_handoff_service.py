"""The cloud half against edges of every kind: repeated, hostile, many, and gone."""

import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import edgert
from edgert.config import EngineConfig
from edgert.format import ErtFile
from edgert.format.identity import identity
from edgert.handoff.certs import write_certificates
from edgert.handoff.handoff_pb2 import Ask, Draft, FromCloud, FromEdge, Hello, Rows, Sampling
from edgert.handoff.sessions import Limits
from edgert.handoff.setup import HandoffConfig
from edgert.handoff.states import EMPTY_CHAIN, Chain, encode
from edgert.handoff.transport import Certificates
from edgert.handoff.wire import METHOD, NAME
from edgert.model.forward import Forward
from edgert.state import Weights
from tests.handoff_models import LAYER, Files, Server, count, random_tokens, serving

GREEDY = Sampling(top_p=1.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def files(handoff_files: Files) -> Files:
    return handoff_files


@pytest.fixture(scope="module")
def model(files: Files) -> str:
    with ErtFile.open(files.whole) as file:
        return identity(file)


@pytest.fixture(scope="module")
def cloud(files: Files) -> Iterator[Server]:
    with serving(files.cloud) as server:
        yield server


class Raw:
    """One stream, message by message."""

    def __init__(self, address: str, channel: Any = None) -> None:
        self.channel = channel or grpc.insecure_channel(address)
        self._out: queue.Queue[bytes | None] = queue.Queue()
        self._call = self.channel.stream_stream(METHOD)(iter(self._out.get, None))

    def send(self, data: bytes | None = None, **kind: Any) -> "Raw":
        self._out.put(FromEdge(**kind).SerializeToString() if data is None else data)
        return self

    def hear(self) -> Any:
        message = FromCloud.FromString(next(self._call))
        return getattr(message, str(message.WhichOneof("kind")))

    def refusal(self) -> tuple[Any, str]:
        with pytest.raises(grpc.RpcError) as error:
            while True:
                next(self._call)
        return error.value.code(), str(error.value.details())

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()
        self.channel.close()


@pytest.fixture
def raw(cloud: Server) -> Iterator[Callable[..., Raw]]:
    made: list[Raw] = []

    def make(server: Server = cloud, channel: Any = None) -> Raw:
        made.append(Raw(server.address, channel))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


class Text:
    """A sequence of tokens with its hidden rows, as an edge computes them, and the whole model's choices."""

    def __init__(self, files: Files, label: object, length: int = 12) -> None:
        self.tokens = random_tokens(label, length, 80)
        with ErtFile.open(files.whole) as file:
            forward = Forward(Weights.of_file(file), EngineConfig(1, 64, 64))
            try:
                hidden = forward.run(self.tokens, layers=(0, LAYER)).copy()
                logits = forward.run(self.tokens, layers=(LAYER, 3), outputs=range(length)).copy()
            finally:
                forward.close()
        self.choices = [int(i) for i in logits.argmax(axis=1)]
        self.states = [encode("f32", hidden[i : i + 1]) for i in range(length)]
        self.chain = Chain()
        for token, state in zip(self.tokens, self.states, strict=True):
            self.chain.append(token, state)

    def rows(self, first: int, last: int) -> Rows:
        states = b"".join(self.states[first:last])
        return Rows(first=first, prefix=self.chain.at(first), tokens=self.tokens[first:last], states=states)

    def ask(self, rows: int) -> Ask:
        return Ask(rows=rows, prefix=self.chain.at(rows))


def hello(of: str, name: bytes = b"x" * 16, **fields: Any) -> Hello:
    known: dict[str, Any] = {"version": 1, "session": name, "model": of, "layer": LAYER, "states": 1}
    return Hello(**(known | {"sampling": GREEDY, "prompt": 4, "prefix": EMPTY_CHAIN} | fields))


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


# ---- what is refused -------------------------------------------------------------------------

Sent = Callable[[Text, str], list[dict[str, Any]]]
GREETED: list[tuple[str, Sent, str, str]] = [
    (
        "not a message",
        lambda t, m: [{"data": b"\xff\xff\xff"}],
        "INVALID_ARGUMENT",
        "none of this wire",
    ),
    ("nothing in it", lambda t, m: [{"data": b""}], "INVALID_ARGUMENT", "no kind"),
    ("a second hello", lambda t, m: [{"hello": hello(m)}], "INVALID_ARGUMENT", "expected one hello"),
    (
        "a token out of range",
        lambda t, m: [{"rows": Rows(prefix=EMPTY_CHAIN, tokens=[10**6], states=t.states[0])}],
        "INVALID_ARGUMENT",
        "token 1000000 in a vocabulary",
    ),
    (
        "bytes missing",
        lambda t, m: [{"rows": Rows(prefix=EMPTY_CHAIN, tokens=[1], states=t.states[0][:-1])}],
        "INVALID_ARGUMENT",
        "expected 160 each",
    ),
    ("no rows", lambda t, m: [{"rows": Rows(prefix=EMPTY_CHAIN)}], "INVALID_ARGUMENT", "0 rows"),
    (
        "not a number",
        lambda t, m: [{"rows": Rows(prefix=EMPTY_CHAIN, tokens=[1], states=b"\xff" * 160)}],
        "INVALID_ARGUMENT",
        "not numbers",
    ),
    (
        "another row for the same number",
        lambda t, m: [
            {"rows": t.rows(0, 2)},
            {"rows": Rows(first=1, prefix=t.chain.at(1), tokens=[t.tokens[1]], states=t.states[0])},
        ],
        "FAILED_PRECONDITION",
        "row 1 is another",
    ),
    (
        "rows after others",
        lambda t, m: [
            {"rows": t.rows(0, 2)},
            {"rows": Rows(first=2, prefix=b"?" * 16, tokens=[1], states=t.states[0])},
        ],
        "FAILED_PRECONDITION",
        "follow others",
    ),
    (
        "a question about other rows",
        lambda t, m: [{"rows": t.rows(0, 2)}, {"ask": Ask(rows=2, prefix=b"?" * 16)}],
        "FAILED_PRECONDITION",
        "other rows",
    ),
    (
        "several tokens of a half",
        lambda t, m: [{"rows": t.rows(0, 2)}, {"ask": Ask(rows=2, prefix=t.chain.at(2), most=4)}],
        "FAILED_PRECONDITION",
        "need a session whose layers are all here",
    ),
    (
        "a draft that is no tree",
        lambda t, m: [{"draft": Draft(rows=1, tokens=[1], parents=[0])}],
        "INVALID_ARGUMENT",
        "a draft with",
    ),
    (
        "more than the context",
        lambda t, m: [{"rows": Rows(prefix=EMPTY_CHAIN, tokens=[1] * 65, states=t.states[0] * 65)}],
        "RESOURCE_EXHAUSTED",
        "65 rows do not fit in a context of 64",
    ),
    ("too large", lambda t, m: [{"data": b"x" * ((4 << 20) + 1)}], "RESOURCE_EXHAUSTED", "a message of"),
]


@pytest.mark.parametrize(
    ("sent", "code", "text"), [case[1:] for case in GREETED], ids=[c[0] for c in GREETED]
)
def test_a_broken_message_ends_its_stream_and_is_counted(
    files: Files, model: str, cloud: Server, raw: Callable[..., Raw], sent: Sent, code: str, text: str
) -> None:
    refused = sum(count(cloud, "edgert_refusals_total", reason=r) for r in REASONS)
    stream = raw()
    stream.send(hello=hello(model, b"broken" + b"." * 10)).hear()
    for message in sent(Text(files, "broken"), model):
        stream.send(**message)
    found, details = stream.refusal()
    assert found.name == code and text in details
    assert sum(count(cloud, "edgert_refusals_total", reason=r) for r in REASONS) == refused + 1
    fresh = raw()  # and nobody else is disturbed
    assert fresh.send(hello=hello(model, b"after it" + b"." * 8)).hear().rows == 0


REASONS = ("malformed", "mismatch", "too many", "too large", "replaced", "internal")


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"version": 2}, "FAILED_PRECONDITION", "found version 2 of the wire, expected 1"),
        ({"model": "0" * 64}, "FAILED_PRECONDITION", "found an edge of the model 000000000000"),
        ({"layer": 1}, "FAILED_PRECONDITION", "layers 2 to 3; this edge needs the layers from 1 on"),
        ({"layer": 0, "states": 0}, "FAILED_PRECONDITION", "layers 2 to 3; this edge needs all layers"),
        ({"states": 0}, "INVALID_ARGUMENT", "rows of kind 0 for layer 2"),
        ({"states": 9}, "INVALID_ARGUMENT", "rows of kind 9"),
        ({"session": b"short"}, "INVALID_ARGUMENT", "a session name of 5 bytes"),
        (
            {"sampling": Sampling(temperature=-1, top_p=1, repetition_penalty=1)},
            "INVALID_ARGUMENT",
            "temperature",
        ),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(
    model: str, raw: Callable[..., Raw], fields: dict[str, Any], code: str, text: str
) -> None:
    found, details = raw().send(hello=hello(model, **fields)).refusal()
    assert found.name == code and text in details


def test_far_too_large_messages_are_refused_by_the_transport(model: str, raw: Callable[..., Raw]) -> None:
    stream = raw()
    stream.send(hello=hello(model, b"huge" + b"." * 12)).hear()
    assert stream.send(data=b"x" * (8 << 20)).refusal()[0] == grpc.StatusCode.RESOURCE_EXHAUSTED


# ---- limits ----------------------------------------------------------------------------------


def test_places_and_clients_are_limited_and_idle_sessions_make_room(files: Files, model: str) -> None:
    limits = Limits(per_client=3, grace_s=0.3)
    with serving(files.cloud, sequences=2, limits=limits) as server:
        text = Text(files, "limits")
        streams = [Raw(server.address) for _ in range(3)]
        for n in (0, 1):
            streams[n].send(hello=hello(model, bytes([n]) * 16)).hear()
            streams[n].send(rows=text.rows(0, 6)).hear()
        code, details = streams[2].send(hello=hello(model, b"2" * 16)).refusal()
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "all 2 places are in use" in details
        time.sleep(0.4)
        streams[1].send(rows=text.rows(6, 7)).hear()  # in use
        third = Raw(server.address)
        assert third.send(hello=hello(model, b"2" * 16)).hear().rows == 0
        # The first lost its place, comes back, and is asked for everything.
        time.sleep(0.4)
        assert streams[0].send(rows=text.rows(6, 8)).hear().rows == 0
        assert streams[0].send(rows=text.rows(0, 8)).hear().rows == 8
        assert streams[0].send(ask=text.ask(8)).hear().tokens[0].id == text.choices[7]
        deadline = time.monotonic() + 10
        while count(server, "edgert_evictions_total") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for stream in (*streams, third):
            stream.close()
    with serving(files.cloud, limits=Limits(per_client=1)) as server:
        one, two = Raw(server.address), Raw(server.address)
        one.send(hello=hello(model, b"1" * 16)).hear()
        code, details = two.send(hello=hello(model, b"2" * 16)).refusal()
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED and "client 'local' holds 1 sessions" in details
        one.close()
        two.close()


def test_rows_that_wait_are_bounded_and_long_prompts_computed_as_they_come(files: Files, model: str) -> None:
    text = Text(files, "waiting", 40)
    with serving(files.cloud, chunk=8, limits=Limits(waiting_bytes=20 * 160)) as server:
        stream = Raw(server.address)
        stream.send(hello=hello(model)).hear()
        assert stream.send(rows=text.rows(0, 15)).hear().rows == 15
        # 15 rows wait; those after them have room only because these are computed, unasked, meanwhile.
        assert stream.send(rows=text.rows(15, 25)).hear().rows == 25
        assert stream.send(ask=text.ask(25)).hear().tokens[0].id == text.choices[24]
        code, details = stream.send(rows=text.rows(25, 40)).send(rows=text.rows(25, 40)).hear(), None
        assert code.rows == 40 and details is None
        other = Raw(server.address)
        other.send(hello=hello(model, b"other" + b"." * 11)).hear()
        found, why = other.send(rows=text.rows(0, 21)).refusal()
        assert found == grpc.StatusCode.RESOURCE_EXHAUSTED and "bytes of hidden rows wait" in why
        stream.close()
        other.close()


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


def test_states_survive_the_wire_as_well_as_it_promises() -> None:
    from edgert.errors import LinkError
    from edgert.handoff.states import decode, row_bytes

    rows = np.random.default_rng(1).standard_normal((5, 70)).astype(np.float32)
    rows[1] *= 1e4
    rows[2, 3] = 900.0  # an outlier spoils its group of 32, and no other
    rows[3] = 0
    for wire, error in (("f32", 0.0), ("f16", 2.0**-11), ("int8", 0.5 / 127 + 2.0**-11)):
        data = encode(wire, rows)  # type: ignore[arg-type]
        assert len(data) == 5 * row_bytes(wire, 70)  # type: ignore[arg-type]
        found = decode(wire, data, 5, 70)  # type: ignore[arg-type]
        for start in (0, 32, 64):
            group = slice(start, start + 32)
            largest = np.abs(rows[:, group]).max(axis=1, keepdims=True)
            assert (np.abs(found[:, group] - rows[:, group]) <= error * largest + 1e-7).all()
        with pytest.raises(LinkError, match="bytes of hidden values"):
            decode(wire, data[:-1], 5, 70)  # type: ignore[arg-type]
    assert np.isfinite(decode("f16", encode("f16", np.full((1, 4), 1e9, np.float32)), 1, 4)).all()
