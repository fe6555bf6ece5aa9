"""`edgert.load` and the object it gives."""

import numbers
import operator
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.chat import render_chat
from edgert.config import EngineConfig, KvType, ModelSpec, SamplingParams
from edgert.engine import Engine
from edgert.errors import ModelFileError, OptionError, UsageError
from edgert.events import Completion, FinishReason, Timings, TokenEvent
from edgert.format import ErtFile
from edgert.format.verify import check
from edgert.kernels import target
from edgert.planner import plan
from edgert.sampling import Sampler, log_probability
from edgert.state import Weights
from edgert.tokenizer import StopMatcher, TextStream, Tokenizer


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    ram: int | str | None = None,
    *,
    context: int | None = None,
    kv: KvType = "f16",
    chunk: int | None = None,
    check_tensors: bool = False,
) -> "Model":
    """Open an .ert file and make it ready to run.

    threads: None for all cores this process may use, fewer for a model too small for them. ram: the
    most resident memory the process may come to, in bytes or as "1GiB"; None for no limit. context:
    positions of the KV cache; None for the model's own, at most 8192. kv: the cache's precision, "f16"
    or "q8". chunk: rows of one prefill pass. None of them changes a bit of the output, `kv` aside.
    check_tensors: read the whole file and compare every checksum first.

    Raises ModelFileError for a file that cannot be used (ChecksumError for damaged tensors),
    MemoryBudgetError when it does not fit.
    """
    if check_tensors:
        check(Path(path))
    file = ErtFile.open(Path(path))
    config = plan(file.spec, file.size, threads=threads, ram=ram, context=context, kv=kv, chunk=chunk)
    return Model(file, config)


class Model:
    """A loaded model. A context manager; not for use by several threads at once.

    The keys and values of the last sequence are kept, so a prompt that continues it is not
    computed again.
    """

    def __init__(self, file: ErtFile, config: EngineConfig) -> None:
        self._file = file
        self.spec: ModelSpec = file.spec
        self.config = config
        self.size = file.size  # bytes
        json_bytes = file.tokenizer_json()
        self._tokenizer = None if json_bytes is None else Tokenizer(json_bytes)
        self._engine = Engine(Weights.of_file(file), config)
        self._lock = threading.Lock()
        self._latest: object = None  # the stream that owns the engine
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises ModelFileError where the file has none."""
        if self._tokenizer is None:
            raise ModelFileError(
                f"{self._file.path} holds no tokenizer: give token ids, or convert it again from a "
                "folder with tokenizer.json"
            )
        return self._tokenizer

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Continue a text, or token ids, and give the whole continuation.

        Options are the fields of SamplingParams: max_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, presence_penalty, seed, stop, logprobs.
        """
        generation = self._start(prompt, options)
        for _ in generation.events():
            pass
        return generation.completion()

    def stream(self, prompt: str | Sequence[int], **options: Any) -> "Generation":
        """As `generate`, token by token: iterate over it, then ask it for its `completion()`."""
        return self._start(prompt, options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Completion:
        """Answer a conversation, rendered with the model's own chat template.

        Raises TemplateError where the model has none or it refuses the messages.
        """
        return self.generate(self.chat_prompt(messages), **options)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation, ready for the model's answer."""
        spec, tokenizer = self.spec, self.tokenizer
        text = render_chat(
            self._file.metadata.get("chat_template"),
            messages,
            bos_token=_piece(tokenizer, spec.bos_id),
            eos_token=_piece(tokenizer, spec.eos_ids[0] if spec.eos_ids else None),
        )
        # The template writes the special tokens itself; the tokenizer must not add them again.
        return tokenizer.encode(text, add_special=False)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, float32 (T, V)."""
        ids = self._checked(tokens)
        result = np.empty((len(ids), self.spec.vocab), np.float32)
        at = 0
        for piece in self._pieces(ids):
            result[at : at + len(piece)] = piece
            at += len(piece)
        return result

    def log_likelihoods(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Natural log-probability of each token but the first, given those before it: float64 (T - 1,)."""
        ids = self._checked(tokens)
        result: list[float] = []
        for piece in self._pieces(ids):
            for row, token in zip(piece, ids[len(result) + 1 :], strict=False):
                result.append(log_probability(row, token))
        return np.array(result)

    def _pieces(self, ids: list[int]) -> Iterator[NDArray[np.float32]]:
        with self._exclusive():
            self._latest = None
            yield from self._engine.logits(ids)

    def close(self) -> None:
        """End the threads and give the file back."""
        self._latest, self._closed = None, True
        self._engine.close()
        self._file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, prompt: str | Sequence[int], options: Mapping[str, Any]) -> "Generation":
        params = sampling_params(options)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self._checked(prompt)
        if not ids:
            raise UsageError("the prompt is empty; expected at least one token")
        sampler = Sampler(params, self.spec.vocab)
        with self._exclusive():
            self._latest = generation = Generation(self, ids, sampler)
        return generation

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        try:
            ids = [operator.index(t) for t in tokens]
        except TypeError:
            raise UsageError(
                f"a prompt of type {type(tokens).__name__}; expected a text, or whole numbers as token ids"
            ) from None
        for token in ids:
            if not 0 <= token < self.spec.vocab:
                raise UsageError(f"token id {token} is outside the vocabulary of {self.spec.vocab}")
        if not ids:
            raise UsageError("there are no tokens; expected at least one")
        return ids

    def _exclusive(self) -> "_Exclusive":
        if self._closed:
            raise UsageError("this model is closed; load it again")
        return _Exclusive(self._lock)


class _Exclusive:
    """Refuses a second thread instead of mixing two sequences."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "this model is at work in another thread; load it once per thread, or take turns"
            )

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

    def __init__(self, model: Model, prompt: list[int], sampler: Sampler) -> None:
        self._model, self._engine, self._sampler = model, model._engine, sampler
        self._clock = _Clock()
        self._cached = self._engine.start(prompt, sampler)
        self._prompt_tokens = len(prompt)
        self._text = TextStream(model.tokenizer) if model._tokenizer else None
        self._stops = StopMatcher(sampler.params.stop)
        if sampler.params.stop and self._text is None:
            raise OptionError("stop needs a tokenizer, and this file holds none")
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
            decode_tok_s=(len(events) - 1) / decode if len(events) > 1 else 0.0,
        )
        stats = {
            "threads": self._model.config.threads,
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
            stats=stats,
            logprobs=tuple(e.logprob for e in events) if self._sampler.params.logprobs else (),
            top_logprobs=tuple(e.top for e in events) if self._sampler.params.logprobs else (),
        )

    def _run(self) -> Iterator[TokenEvent]:
        limit, ends = self._sampler.params.max_tokens, self._model.spec.eos_ids
        while len(self._given) < limit:
            with self._model._exclusive():
                if self._model._latest is not self:
                    raise UsageError("this stream ended: the model has begun another generation since")
                if self._engine.full:
                    break
                choice = self._engine.step()
            if choice is None:
                continue
            now = time.perf_counter()
            self._clock.first = self._clock.first or now
            if choice.token in ends:
                self._reason = "stop"
                self._tail = self._rest()[0]
                if self._tail:  # held back as the start of a stop string or of a character
                    yield TokenEvent(choice.token, self._tail, choice.logprob, "model", choice.top)
                return
            self._clock.last = now
            last = len(self._given) + 1 == limit or self._engine.full
            text, stopped = self._show(choice.token, last)
            event = TokenEvent(choice.token, text, choice.logprob, "model", choice.top)
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


_REAL_OPTIONS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from keyword options; raises OptionError for an unknown one or a wrong value."""
    known = {f.name for f in fields(SamplingParams)}
    for name in options:
        if name not in known:
            raise OptionError(f"there is no option {name!r}; there are: {', '.join(sorted(known))}")
    return SamplingParams(**{name: _typed(name, value) for name, value in options.items()})


def _typed(name: str, value: Any) -> Any:
    """The value of a sampling option in its own type; raises OptionError where it has another."""
    if name == "seed" and value is None:
        return None
    if name == "stop":
        texts = () if value is None else (value,) if isinstance(value, str) else value
        if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
            return tuple(texts)
        expected = "a text or a list of texts"
    elif name in _REAL_OPTIONS:
        if isinstance(value, numbers.Real):
            return float(value)
        expected = "a number"
    else:
        if isinstance(value, numbers.Integral):
            return int(value)
        expected = "a whole number"
    raise OptionError(f"{name} is {value!r}; expected {expected}")


def _piece(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.id_to_token(token) or ""
