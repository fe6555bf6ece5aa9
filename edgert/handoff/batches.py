"""The cloud half's computation: the questions of many sessions, answered by shared forwards.

Rows of different sessions stand side by side in one forward, which reads the weights once for all of
them; a row's result does not depend on its neighbours (docs/architecture.md), so every client gets the
tokens it would have got alone.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, LinkError
from edgert.handoff.handoff_pb2 import Answer
from edgert.handoff.metrics import Metrics
from edgert.handoff.sessions import RefusedError, Session
from edgert.handoff.wire import choice_message
from edgert.model.forward import Forward
from edgert.sampling import Choice
from edgert.state import MAX_OUTPUTS

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Question:
    """What a client waits for: the token after its rows, and `more` after that; or what of a draft holds.

    `give` is called in the event loop with each answer, or with the refusal that ends it.
    """

    session: Session
    give: Callable[[Answer | RefusedError], None]
    more: int = 0  # tokens still to come after the next: only where the cloud computes all layers
    guesses: tuple[int, ...] = ()  # a token tree behind the rows
    parents: tuple[int, ...] = ()
    fill: bool = False  # nobody asked yet: compute all rows but the newest, choose nothing


@dataclass(frozen=True)
class _Share:
    """A question's rows in one forward."""

    question: Question
    place: int  # sequence of the cache
    start: int  # rows of the session that were computed before
    first: int  # its first row in the batch
    count: int
    outputs: tuple[int, ...]  # rows of the batch whose logits it needs; none while rows are missing
    tokens: list[int]  # of the session, all: what is chosen depends on them


Found = list[Choice] | EdgertError
"""What a share led to: tokens (of a draft perhaps several, else one; none from a mere part of the rows)."""


class Batches:
    """Questions in, answers out. Runs in one event loop; forwards run in one thread beside it."""

    def __init__(self, forward: Forward, metrics: Metrics) -> None:
        self._forward, self._metrics = forward, metrics
        self._open: dict[Session, Question] = {}  # in order of arrival
        self._thread = ThreadPoolExecutor(1, "edgert-cloud")
        self._wanted = asyncio.Event()
        self._settled = asyncio.Condition()

    @property
    def open(self) -> int:
        """Questions that wait for an answer."""
        return len(self._open)

    def ask(self, question: Question) -> None:
        """Answer a question; one of the same session that is still open is forgotten."""
        self._open[question.session] = question
        self._wanted.set()

    def fill(self, session: Session) -> None:
        """Compute a session's rows before it is asked about them."""
        if session not in self._open:
            self.ask(Question(session, lambda _: None, fill=True))

    def forget(self, session: Session) -> None:
        """Nobody waits for this session's answer any more."""
        self._open.pop(session, None)

    async def settled(self, session: Session) -> None:
        """Wait until no thread computes rows of this session: then it may be changed."""
        if session.busy:
            async with self._settled:
                await self._settled.wait_for(lambda: not session.busy)

    async def work(self) -> None:
        """Answer questions until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wanted.wait()
                shares = self._lines() or self._trees()
                if not shares:
                    self._wanted.clear()
                    continue
                hidden = self._take(shares)
                with self._metrics.forward(sum(share.count for share in shares)):
                    found = await loop.run_in_executor(self._thread, self._compute, shares, hidden)
                await self._settle(shares, found)
        finally:
            self._thread.shutdown()

    def _asked(self) -> list[tuple[int, Question]]:
        """(rows to compute, question), fewest rows first, of the layer of the oldest."""
        if not self._open:
            return []
        layer = next(iter(self._open)).layer  # one range of layers per forward
        lengths = self._forward.cache.lengths
        asked = [
            (s.rows - lengths[s.place], q)
            for s, q in self._open.items()
            if s.layer == layer and s.place is not None
        ]
        return sorted(asked, key=lambda pair: pair[0])

    def _lines(self) -> list[_Share]:
        """Rows of sequences for the next forward; a long prompt takes what room the others leave."""
        shares: list[_Share] = []
        first = ending = 0
        for pending, question in self._asked():
            # The newest row of a draft is the root of its tree; that of a fill waits to be asked about.
            wanted = pending - 1 if question.guesses or question.fill else pending
            count = min(wanted, self._forward.config.chunk - first)
            ends = count == pending and ending < MAX_OUTPUTS
            if count == pending and not ends:
                count -= 1  # no room for its logits: all but the row that has them
            if count > 0:
                shares.append(self._share(question, first, count, (first + count - 1,) if ends else ()))
                first, ending = first + count, ending + ends
        return shares

    def _trees(self) -> list[_Share]:
        """Drafts for the next forward, once nothing else is left."""
        shares: list[_Share] = []
        first, most = 0, min(MAX_OUTPUTS, self._forward.config.chunk)
        for _, question in self._asked():
            count = 1 + len(question.guesses)
            if count > 1 and first + count <= most:
                shares.append(self._share(question, first, count, tuple(range(first, first + count))))
                first += count
        return shares

    def _share(self, question: Question, first: int, count: int, outputs: tuple[int, ...]) -> _Share:
        session = question.session
        assert session.place is not None
        start = self._forward.cache.lengths[session.place]
        return _Share(question, session.place, start, first, count, outputs, session.tokens.copy())

    @staticmethod
    def _take(shares: list[_Share]) -> NDArray[np.float32] | None:
        """The hidden rows of a batch, copied: the loop goes on receiving. None from layer 0 on."""
        hidden: list[NDArray[np.float32]] = []
        for share in shares:
            share.question.session.busy = True
            hidden += share.question.session.waiting[: share.count]
        return np.stack(hidden) if hidden else None

    def _compute(self, shares: list[_Share], hidden: NDArray[np.float32] | None) -> list[Found]:
        """One forward and the tokens it leads to, for each share: in the thread beside the loop."""
        try:
            return self._run(shares, hidden)
        except EdgertError as error:
            return [error] * len(shares)
        except Exception as error:  # a fault of ours ends these streams, not the server
            _log.exception("a forward failed")
            return [LinkError(f"{type(error).__name__} in the cloud half")] * len(shares)

    def _run(self, shares: list[_Share], hidden: NDArray[np.float32] | None) -> list[Found]:
        tree = bool(shares[0].question.guesses) and bool(shares[0].outputs)
        tokens: list[int] = []
        parents: list[int] = []
        for share in shares:
            rows = share.tokens[share.start : share.start + share.count]
            tokens += [*rows, *share.question.guesses] if tree else rows
            parents += [-1, *(share.first + 1 + parent for parent in share.question.parents)] if tree else []
        logits = self._forward.run(
            tokens,
            outputs=[row for share in shares for row in share.outputs],
            parents=parents if tree else None,
            layers=(shares[0].question.session.layer, self._forward.spec.layers),
            hidden=hidden,
            sequences=[share.place for share in shares for _ in range(share.count)],
        )
        found: list[Found] = []
        at = 0
        for share in shares:
            found.append(self._choose(share, logits[at : at + len(share.outputs)]))
            at += len(share.outputs)
        return found

    def _choose(self, share: _Share, logits: NDArray[np.float32]) -> Found:
        """The tokens that follow: after the newest row, and along the guesses as far as they are right."""
        question, session = share.question, share.question.session
        prompt, generated = share.tokens[: session.prompt], share.tokens[session.prompt :]
        choices: list[Choice] = []
        slots: list[int] = []
        node = 0 if share.outputs else -1
        try:
            while node >= 0:
                choices.append(session.sampler.choose(logits[node], prompt, generated))
                generated.append(choices[-1].token)
                slots.append(share.start + node)
                node = _child(question, node, choices[-1].token)
        except EdgertError as error:
            return error
        if question.guesses and share.outputs:
            self._forward.cache.keep(slots, share.place)
        return choices

    async def _settle(self, shares: list[_Share], found: list[Found]) -> None:
        """Put what was computed into the sessions, and give the answers."""
        for share, choices in zip(shares, found, strict=True):
            session = share.question.session
            session.busy = False
            if isinstance(choices, EdgertError):
                self.forget(session)
                share.question.give(RefusedError("internal", str(choices)))
                continue
            del session.waiting[: share.count]
            layers = share.count * (self._forward.spec.layers - session.layer)
            session.layer_tokens += layers
            self._metrics.layer_tokens.inc(layers)
            if choices:
                self._answer(share, choices)
            elif share.question.fill and self._open.get(session) is share.question:
                self.forget(session)  # it is filled again when as much has come
        async with self._settled:
            self._settled.notify_all()

    def _answer(self, share: _Share, choices: list[Choice]) -> None:
        question, session, rows = share.question, share.question.session, len(share.tokens)
        for choice in choices[:-1]:  # the guesses that were right are rows of the session now
            _append(session, choice.token)
        answer = Answer(rows=rows, tokens=map(choice_message, choices), layer_tokens=session.layer_tokens)
        session.answers[rows] = answer
        self._metrics.answers.inc(len(choices))
        question.give(answer)
        if self._open.get(session) is not question:
            return  # another came meanwhile, or the client left
        last, spec = choices[-1].token, self._forward.spec
        if question.more > 0 and last not in spec.eos_ids and session.rows < self._forward.cache.limit:
            question.more -= 1
            _append(session, last)
        else:
            self.forget(session)


def _child(question: Question, node: int, token: int) -> int:
    """The node of the draft that guessed `token` after `node`; -1 for none. Node 0 is the newest row."""
    for guess, parent in zip(range(len(question.guesses)), question.parents, strict=True):
        if parent + 1 == node and question.guesses[guess] == token:
            return guess + 1
    return -1


def _append(session: Session, token: int) -> None:
    session.tokens.append(token)
    session.chain.append(token, b"")
