"""What a cloud half does not take: broken messages, strangers, and more than its limits."""

import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import grpc
import pytest

from edgert.handoff.handoff_pb2 import Ask, Draft, Rows, Sampling
from edgert.handoff.sessions import Limits
from edgert.handoff.states import EMPTY_CHAIN
from tests.handoff_models import Files, Server, count, serving
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


def test_a_message_that_was_refused_is_not_kept(model: str, raw: Callable[[], Raw]) -> None:
    """Also where nothing collects cycles: strangers may send large ones faster than that happens."""
    data = b"x" * ((4 << 20) + 1)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for number in range(4):
            stream = raw()
            stream.send(hello=hello(model, b"kept%d" % number + b"." * 11)).hear()
            stream.send(data=data).refusal()
        assert tracemalloc.get_traced_memory()[0] < 2 * len(data)
    finally:
        tracemalloc.stop()
        gc.enable()


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
