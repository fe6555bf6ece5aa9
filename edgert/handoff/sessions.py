"""What the cloud half holds for its clients: their rows, their places in the KV cache, and the limits.

A session is one sequence of rows. Rows that are not computed yet wait here as hidden values; once
computed, only keys and values are left of them. Everything is bounded: places in the cache, sessions of
one client, and the bytes that wait. Nothing here knows of gRPC, and all of it runs in one thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, LinkError
from edgert.handoff.handoff_pb2 import STATES_NONE, Answer, Ask, Draft, Hello, Rows
from edgert.handoff.states import Chain, Wire, decode, row_bytes
from edgert.handoff.wire import VERSION, WIRE_OF, read_sampling
from edgert.kv_cache import KvCache
from edgert.sampling import Sampler

Reason = Literal[
    "malformed", "mismatch", "too many", "too large", "replaced", "draining", "internal", "stranger"
]


class RefusedError(LinkError):
    """Why a stream is ended; `reason` is what is counted and what the status code follows from."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Limits:
    """What a cloud half grants. Places in the cache are `EngineConfig.sequences`."""

    per_client: int = 16  # sessions that one client may hold at a time
    message_bytes: int = 4 << 20  # of one message; 256 rows of 4096 float32 values
    waiting_bytes: int = 256 << 20  # of hidden rows that are not computed yet, of all sessions together
    idle_s: float = 600.0  # a session unused for so long loses its place
    grace_s: float = 2.0  # and after so long, if another needs it; without a stream at once


@dataclass(eq=False)
class Session:
    """One client's sequence. `place` is its sequence of the cache; None once it was evicted."""

    client: str
    name: bytes
    layer: int  # where its rows enter
    wire: Wire | None  # None: tokens alone
    place: int | None
    sampler: Sampler
    prompt: int  # tokens of it
    tokens: list[int] = field(default_factory=list)
    chain: Chain = field(default_factory=Chain)
    waiting: list[NDArray[np.float32]] = field(default_factory=list)  # [D] each: rows not computed yet
    answers: dict[int, Answer] = field(default_factory=dict)  # the latest, by the rows it follows
    used: float = 0.0  # when it was last heard of
    busy: bool = False  # its rows are being computed
    stream: object = None  # the one that speaks for it; None while its client is away
    layer_tokens: int = 0

    @property
    def rows(self) -> int:
        """Rows held, computed or waiting."""
        return len(self.tokens)


class Sessions:
    """The sessions of one cloud half, over the places of its cache."""

    def __init__(
        self,
        cache: KvCache,
        width: int,
        vocab: int,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self.evictions = limits, 0
        self._cache, self._width, self._vocab, self._clock = cache, width, vocab, clock
        self._free = list(range(len(cache.lengths)))[::-1]
        self._all: dict[tuple[str, bytes], Session] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def waiting_bytes(self) -> int:
        """Memory of all hidden rows that are not computed yet."""
        return sum(len(session.waiting) for session in self._all.values()) * self._width * 4

    def find(self, client: str, name: bytes) -> Session | None:
        """The session of this name, if it holds a place."""
        return self._all.get((client, name))

    def open(self, client: str, hello: Hello, stream: object) -> Session:
        """The session a stream speaks for, taken over from the stream before or new.

        It holds the rows the edge says still hold, if their hash agrees, and forgets the rest.
        """
        sampler = self._sampler(hello)
        wire = WIRE_OF.get(hello.states)
        key = client, hello.session
        session = self._all.get(key)
        if session is None or (session.layer, session.wire) != (hello.layer, wire):
            if session is not None:
                self.evict(session)
            session = Session(client, hello.session, hello.layer, wire, None, sampler, hello.prompt)
            self._seat(session)
        keep = min(hello.rows, session.rows)
        if keep < hello.rows or session.chain.at(keep) != hello.prefix:
            keep = 0
        same = session.sampler.params == sampler.params and session.sampler.seed == sampler.seed
        if not (same and session.prompt == hello.prompt):
            session.answers.clear()
        session.sampler, session.prompt, session.stream = sampler, hello.prompt, stream
        self.cut(session, keep)
        self._touch(session)
        return session

    def accept(self, session: Session, rows: Rows) -> bool:
        """Take rows in; False where some before them are missing, so that the edge has to send them.

        Rows that are held already change nothing if they are the same, and are refused if they are not.
        """
        self._seat(session)
        states = self._states(session, rows)
        first, held = rows.first, session.rows
        if first > held:
            return False
        if session.chain.at(first) != rows.prefix:
            raise RefusedError("mismatch", f"rows from {first} on follow others than the {held} rows held")
        if first + len(rows.tokens) > self._cache.limit:
            raise RefusedError(
                "too large",
                f"{first + len(rows.tokens)} rows do not fit in a context of {self._cache.limit}",
            )
        hidden = None
        if session.wire is not None:
            more = len(rows.tokens) * self._width * 4
            if self.waiting_bytes + more > self.limits.waiting_bytes:
                raise RefusedError(
                    "too many", f"{self.waiting_bytes} bytes of hidden rows wait; try again later"
                )
            try:
                hidden = decode(session.wire, rows.states, len(rows.tokens), self._width)
            except LinkError as error:
                raise RefusedError("malformed", str(error)) from None
        for index, (token, state) in enumerate(zip(rows.tokens, states, strict=True)):
            number = first + index
            if number < held:
                after = Chain.after(session.chain.at(number), token, state)
                if after != session.chain.at(number + 1):
                    raise RefusedError("mismatch", f"row {number} is another than the one held")
                continue
            session.tokens.append(token)
            session.chain.append(token, state)
            if hidden is not None:
                session.waiting.append(hidden[index])
        return True

    def recall(self, session: Session, question: Ask | Draft) -> Answer | Literal["missing", "open"]:
        """What a question needs: the answer given before, rows that are missing, or to be computed."""
        self._seat(session)
        count, held = question.rows, session.rows
        if count > held:
            return "missing"
        if count < 1 or session.chain.at(count) != question.prefix:
            raise RefusedError("mismatch", f"a question about {count} other rows than those held")
        if count in session.answers:
            return session.answers[count]
        assert session.place is not None
        if self._cache.lengths[session.place] >= count:
            # Computed already, but the answer is gone: the last row once more. Its hidden values are
            # gone as well, except where the cloud computes all layers.
            self.cut(session, count - 1)
            return "missing"
        if count < held:
            raise RefusedError("mismatch", f"a question about {count} rows after {held} rows were sent")
        return "open"

    def cut(self, session: Session, rows: int) -> None:
        """Forget all rows but the first `rows`."""
        assert session.place is not None
        computed = min(self._cache.lengths[session.place], rows)
        del session.tokens[rows:]
        session.chain.cut(rows)
        if session.wire is not None:
            del session.waiting[max(0, rows - computed) :]
        self._cache.rewind(computed, session.place)
        session.answers = {count: answer for count, answer in session.answers.items() if count <= rows}

    def evict(self, session: Session) -> None:
        """Take a session's place; its client is asked to send all rows again when it comes back."""
        if session.place is None:
            return
        self.cut(session, 0)
        self._free.append(session.place)
        session.place = None
        del self._all[session.client, session.name]
        self.evictions += 1

    def evict_idle(self) -> None:
        """Take the places of sessions that were not used for `idle_s`."""
        limit = self._clock() - self.limits.idle_s
        for session in [s for s in self._all.values() if s.used < limit and not s.busy]:
            self.evict(session)

    def _seat(self, session: Session) -> None:
        """Give a session that is new, or was evicted, a place in the cache, if need be another's."""
        self._touch(session)
        if session.place is not None:
            return
        if (session.client, session.name) in self._all:
            raise RefusedError("replaced", "another stream speaks for this session now")
        own = [other for other in self._all.values() if other.client == session.client]
        if len(own) >= self.limits.per_client and not self._make_room(own):
            raise RefusedError(
                "too many", f"client {session.client!r} holds {len(own)} sessions, as many as it may"
            )
        if not self._free and not self._make_room(list(self._all.values())):
            raise RefusedError("too many", f"all {len(self._all)} places are in use; try again later")
        session.place = self._free.pop()
        session.tokens, session.chain, session.waiting, session.answers = [], Chain(), [], {}
        self._all[session.client, session.name] = session

    def _make_room(self, sessions: list[Session]) -> bool:
        """Evict one that is not in use, of those whose client is away the longest unused; False for none."""
        limit = self._clock() - self.limits.grace_s
        idle = [s for s in sessions if not s.busy and (s.stream is None or s.used < limit)]
        if idle:
            self.evict(min(idle, key=lambda s: (s.stream is not None, s.used)))
        return bool(idle)

    def _sampler(self, hello: Hello) -> Sampler:
        try:
            return Sampler(read_sampling(hello.sampling), self._vocab)
        except EdgertError as error:
            raise RefusedError("malformed", str(error)) from None

    def _touch(self, session: Session) -> None:
        session.used = self._clock()

    def _states(self, session: Session, rows: Rows) -> list[bytes]:
        """The bytes of each row's hidden values; RefusedError for tokens or bytes that cannot be rows."""
        count = len(rows.tokens)
        size = 0 if session.wire is None else row_bytes(session.wire, self._width)
        if not count or len(rows.states) != count * size:
            raise RefusedError(
                "malformed", f"{count} rows with {len(rows.states)} bytes of values, expected {size} each"
            )
        if max(rows.tokens) >= self._vocab:
            raise RefusedError("malformed", f"token {max(rows.tokens)} in a vocabulary of {self._vocab}")
        return [rows.states[i * size : (i + 1) * size] for i in range(count)]


def check_draft(draft: Draft, vocab: int, most: int) -> None:
    """Raise RefusedError unless the guesses are a tree of at most `most` nodes, each after its parent."""
    tokens, parents = draft.tokens, draft.parents
    if not 0 < len(tokens) == len(parents) <= most:
        raise RefusedError("malformed", f"a draft of {len(tokens)} tokens and {len(parents)} parents")
    if max(tokens) >= vocab or not all(-1 <= parent < node for node, parent in enumerate(parents)):
        raise RefusedError("malformed", f"a draft with tokens or parents out of range: {list(parents)[:8]}")


def check_hello(hello: Hello, model: str, tokenizer: str, first_layer: int, layers: int) -> None:
    """Raise RefusedError unless a cloud half that holds the layers from `first_layer` on can serve it."""
    if hello.version != VERSION:
        raise RefusedError("mismatch", f"found version {hello.version} of the wire, expected {VERSION}")
    # Who sends tokens alone may have another model, as long as both mean the same by them.
    if hello.model != model and not (hello.layer == 0 and hello.model == tokenizer != ""):
        raise RefusedError(
            "mismatch",
            f"found an edge of the model {hello.model[:12] or '(none)'}..., expected {model[:12]}...; "
            "use the two halves of one `edgert convert --split`",
        )
    if len(hello.session) != 16:
        raise RefusedError("malformed", f"a session name of {len(hello.session)} bytes, expected 16")
    if (hello.states == STATES_NONE) != (hello.layer == 0) or hello.states not in (STATES_NONE, *WIRE_OF):
        raise RefusedError("malformed", f"rows of kind {hello.states} for layer {hello.layer}")
    if not first_layer <= hello.layer < layers or (first_layer and hello.layer != first_layer):
        wanted = "all layers" if hello.layer == 0 else f"the layers from {hello.layer} on"
        raise RefusedError(
            "mismatch", f"found a cloud half of layers {first_layer} to {layers}; this edge needs {wanted}"
        )
