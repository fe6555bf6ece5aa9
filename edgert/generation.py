"""One running generation: what an engine commits, as a stream of TokenEvents."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgert.decoding import Commit
from edgert.engine import Engine
from edgert.errors import OptionError, UsageError
from edgert.events import Completion, FinishReason, Timings, TokenEvent
from edgert.kernels import target
from edgert.sampling import Sampler
from edgert.tokenizer import StopMatcher, TextStream, Tokenizer


class Turns:
    """Who may use an engine: one thread at a time, and of all streams only the latest."""

    def __init__(self) -> None:
        self.latest: object = None
        self.closed = False
        self._lock = threading.Lock()

    def take(self, stream: object = None) -> "_Turn":
        """A context that holds the engine; for `stream`, only as long as it is the latest.

        Raises UsageError once the model is closed, and on entry where it is another's turn.
        """
        if self.closed:
            raise UsageError("this model is closed; load it again")
        return _Turn(self, self._lock, stream)


class _Turn:
    """Refuses a second thread instead of mixing two sequences."""

    def __init__(self, turns: Turns, lock: threading.Lock, stream: object) -> None:
        self._turns, self._lock, self._stream = turns, lock, stream

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "this model is at work in another thread; load it once per thread, or take turns"
            )
        if self._stream is not None and self._turns.latest is not self._stream:
            self._lock.release()
            raise UsageError("this stream ended: the model has begun another generation since")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@dataclass
class _Clock:
    """When things happened, in seconds of time.perf_counter."""

    start: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0


class Generation:
    """One running generation: an iterator of TokenEvents that knows its text so far."""

    def __init__(
        self, engine: Engine, turns: Turns, tokenizer: Tokenizer | None, prompt: list[int], sampler: Sampler
    ) -> None:
        self._engine, self._turns, self._sampler = engine, turns, sampler
        store = engine.forward.store
        self._before = store.totals() if store else {}
        self._fired, self._gated = engine.forward.fired, engine.forward.gated
        self._clock = _Clock()
        self._cached = engine.start(prompt, sampler)
        self._report = engine.report
        self._prompt_tokens = len(prompt)
        self._text = TextStream(tokenizer) if tokenizer else None
        self._stops = StopMatcher(sampler.params.stop)
        if sampler.params.stop and self._text is None:
            raise OptionError("stop needs a tokenizer, and this file holds none")
        self._committed: deque[Commit] = deque()  # what the engine gave and nobody has seen yet
        self._given: list[TokenEvent] = []
        self._tail = ""  # text that came with the end-of-sequence token
        self._reason: FinishReason = "interrupted"
        self._events = self._run()

    def events(self) -> Iterator[TokenEvent]:
        """The events still to come."""
        return self._events

    def __iter__(self) -> Iterator[TokenEvent]:
        return self._events

    def __next__(self) -> TokenEvent:
        return next(self._events)

    def completion(self) -> Completion:
        """All that came so far; `finish_reason` is "interrupted" before the end."""
        events, clock = self._given, self._clock
        computed = self._prompt_tokens - self._cached
        prefill, decode = clock.first - clock.start, clock.last - clock.first
        timings = Timings(
            first_token_s=prefill if clock.first else 0.0,
            prefill_tok_s=computed / prefill if clock.first else 0.0,
            decode_tok_s=(len(events) - 1) / decode if decode > 0 else 0.0,
        )
        stats = {
            "threads": self._engine.forward.config.threads,
            "lowering": target.lowering().name,
            "cached_prompt_tokens": self._cached,
            "seed": self._sampler.seed,
        }
        return Completion(
            text="".join(e.text for e in events) + self._tail,
            tokens=tuple(e.token for e in events),
            finish_reason=self._reason,
            prompt_tokens=self._prompt_tokens,
            timings=timings,
            stats=stats | self._firing() | self._report() | self._streamed(),
            logprobs=tuple(e.logprob for e in events) if self._sampler.params.logprobs else (),
            top_logprobs=tuple(e.top for e in events) if self._sampler.params.logprobs else (),
        )

    def _firing(self) -> dict[str, Any]:
        """Which share of the neurons was read, where they are read one by one, and of their gates."""
        forward, found = self._engine.forward, {}
        counts = (("neurons_read", forward.fired, self._fired), ("gates_read", forward.gated, self._gated))
        for name, (read, of), (read_before, of_before) in counts:
            if of > of_before:
                found[name] = (read - read_before) / (of - of_before)
        return found

    def _streamed(self) -> dict[str, Any]:
        """What the experts' store did for this generation."""
        store = self._engine.forward.store
        return store.report(self._before) if store else {}

    def _run(self) -> Iterator[TokenEvent]:
        limit, ends = self._sampler.params.max_tokens, self._engine.forward.spec.eos_ids
        while len(self._given) < limit:
            with self._turns.take(self):
                if not self._committed:
                    if self._engine.sequence.full:
                        break
                    self._committed.extend(self._engine.step())
                if not self._committed:
                    continue
                choice, source, fallback = self._committed.popleft()
                last = len(self._given) + 1 == limit or (self._engine.sequence.full and not self._committed)
            now = time.perf_counter()
            self._clock.first = self._clock.first or now
            if choice.token in ends:
                self._reason = "stop"
                self._tail = self._rest()[0]
                if self._tail:  # held back as the start of a stop string or of a character
                    yield TokenEvent(choice.token, self._tail, choice.logprob, source, choice.top, fallback)
                return
            self._clock.last = now
            text, stopped = self._show(choice.token, last)
            event = TokenEvent(choice.token, text, choice.logprob, source, choice.top, fallback)
            self._given.append(event)
            if stopped:
                self._reason = "stop"
                yield event
                return
            yield event
        self._reason = "length"

    def _show(self, token: int, last: bool) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string came."""
        if self._text is None:
            return "", False
        shown, stop = self._stops.push(self._text.push(token))
        if not last or stop is not None:
            return shown, stop is not None
        rest, stopped = self._rest()
        return shown + rest, stopped

    def _rest(self) -> tuple[str, bool]:
        """The text that was held back, once nothing more comes, and whether a stop string came in it."""
        if self._text is None:
            return "", False
        shown, stop = self._stops.push(self._text.flush())
        return (shown, True) if stop is not None else (shown + self._stops.flush(), False)
