"""`edgert.load` and the object it gives."""

import numbers
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgert import experts, neurons
from edgert.chat import render_chat
from edgert.config import EngineConfig, KvType, ModelSpec, SamplingParams
from edgert.decoding import Decoder
from edgert.engine import Engine
from edgert.errors import ModelFileError, OptionError, UsageError
from edgert.events import Completion
from edgert.flash import Parts, Store, Streaming
from edgert.format import ErtFile
from edgert.format.verify import check
from edgert.generation import Generation, Turns
from edgert.handoff.setup import HandoffConfig, make_decoder
from edgert.planner import plan
from edgert.sampling import Sampler, log_probability
from edgert.speculation import Draft, drafting
from edgert.state import Weights
from edgert.tokenizer import Tokenizer


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    ram: int | str | None = None,
    *,
    context: int | None = None,
    kv: KvType = "f16",
    chunk: int | None = None,
    check_tensors: bool = False,
    draft: Draft | Sequence[Draft] | None = None,
    tree: int | None = None,
    draft_store: Draft | None = None,
    draft_learn: bool = False,
    handoff: HandoffConfig | None = None,
    streaming: Streaming | None = None,
    sparsity: Literal["auto", "none"] = "auto",
) -> "Model":
    """Open an .ert file and make it ready to run.

    threads: None for all cores this process may use, fewer for a model too small for them. ram: the
    most resident memory the process may come to, in bytes or as "1GiB"; None for no limit. context:
    positions of the KV cache; None for the model's own, at most 8192. kv: the cache's precision, "f16"
    or "q8". chunk: rows of one prefill pass. None of them changes a bit of the output, `kv` aside.
    check_tensors: read the whole file and compare every checksum first. handoff: answer from the model's
    exits where they are sure, else from the layers behind them, here or in a cloud (docs/handoff.md).

    draft: who guesses ahead, several tokens to be checked at once: a draft model's .ert file, "lookup"
    (what followed the same words before), "exit" (the model's own lower layers), "sparse" (the model with
    the thresholds of its file, which then apply to guesses alone), "auto" (all there is but that), or
    several of them. The output is the same; speculation that does not pay is not used. tree:
    most guesses checked at once, 2 to 64. draft_store: a file that keeps what lookup saw between runs.
    draft_learn: correct the draft's head by what the model chooses, as long as it is loaded.

    streaming: how experts, or neurons, are read from the file where `ram` does not hold them all; None for
    defaults.

    sparsity: of a file converted with a share of zeros, "auto" takes its small activations, or inputs, for
    zero, of one with predictors the neurons that they expect to be silent, and of one with cores those that
    the prompt did not use most, which is not exact; "none" computes them.
    draft "sparse" makes up for it: the model with zeros guesses, and what it would say
    without is what counts.

    Raises ModelFileError for a file that cannot be used (ChecksumError for damaged tensors),
    MemoryBudgetError when it does not fit.
    """
    if check_tensors:
        check(Path(path))
    file = ErtFile.open(Path(path))
    if handoff is None:
        _check_whole(file)
    elif draft is not None:
        raise OptionError("draft and handoff both say how tokens come about; give one of them")
    elif file.spec.core and sparsity == "auto":
        raise OptionError(
            f"{file.path} goes on with the neurons that its prompt used most, which a hand-off cannot; give "
            "sparsity none"
        )
    guesses = None
    if draft is not None:
        guesses = drafting(
            file,
            draft,
            tree=tree,
            store=draft_store,
            learn=draft_learn,
            threads=threads,
            context=context,
            kv=kv,
        )
    elif tree is not None or draft_store is not None or draft_learn:
        raise OptionError("tree, draft_store and draft_learn belong to a draft; give draft as well")
    if sparsity not in ("auto", "none"):
        raise OptionError(f"sparsity is {sparsity!r}; expected auto or none")
    config = plan(
        file.spec,
        file.size,
        threads=threads,
        ram=ram,
        context=context,
        kv=kv,
        chunk=chunk,
        draft_bytes=guesses.nbytes if guesses else 0,
        streamed=_parts(file),
    )
    if sparsity == "auto":
        config = replace(
            config,
            thresholds=file.sparsity.thresholds if file.spec.neurons and file.sparsity is not None else (),
            inputs=file.inputs.thresholds if file.inputs is not None else (),
            predict=bool(file.spec.predictors or file.spec.core),
            exact=guesses is not None and "sparse" in guesses.names,
        )
    if handoff is not None:
        return Model(file, config, make_decoder(file, handoff), streaming)
    return Model(file, config, guesses.decoder(file.spec) if guesses else None, streaming)


class Model:
    """A loaded model. A context manager; not for use by several threads at once.

    The keys and values of the last sequence are kept, so a prompt that continues it is not
    computed again.
    """

    def __init__(
        self,
        file: ErtFile,
        config: EngineConfig,
        decoder: Decoder | None = None,
        streaming: Streaming | None = None,
    ) -> None:
        self._file = file
        self.spec: ModelSpec = file.spec
        self.config = config
        self.size = file.size  # bytes
        json_bytes = file.tokenizer_json()
        self._tokenizer = None if json_bytes is None else Tokenizer(json_bytes)
        weights: Weights = Weights.of_file(file)
        store: Store | None = None
        if config.slots:
            weights, store = _streamed(file, config.slots, streaming or Streaming())
        self._engine = Engine(weights, config, decoder, store)
        self._turns = Turns()

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

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Generation:
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

    def log_likelihoods(self, tokens: Sequence[int], prompt: int | None = None) -> NDArray[np.float64]:
        """Natural log-probability of each token but the first, given those before it: float64 (T - 1,).

        prompt: how many of the tokens are the prompt, which in a file with cores says what the others are
        computed with; None for all of them.
        """
        ids = self._checked(tokens)
        result: list[float] = []
        for piece in self._pieces(ids, prompt):
            for row, token in zip(piece, ids[len(result) + 1 :], strict=False):
                result.append(log_probability(row, token))
        return np.array(result)

    def _pieces(self, ids: list[int], prompt: int | None = None) -> Iterator[NDArray[np.float32]]:
        with self._turns.take():
            self._turns.latest = None
            yield from self._engine.logits(ids, prompt)

    def close(self) -> None:
        """End the threads and give the file back."""
        self._turns.latest, self._turns.closed = None, True
        self._engine.close()
        self._file.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, prompt: str | Sequence[int], options: Mapping[str, Any]) -> Generation:
        params = sampling_params(options)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self._checked(prompt)
        if not ids:
            raise UsageError("the prompt is empty; expected at least one token")
        sampler = Sampler(params, self.spec.vocab)
        with self._turns.take():
            generation = Generation(self._engine, self._turns, self._tokenizer, ids, sampler)
            self._turns.latest = generation
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


def _parts(file: ErtFile) -> Parts | None:
    """What of the file can be read when it is needed."""
    if file.spec.neurons:
        return neurons.neuron_parts(file.spec, file.tensors)
    return experts.expert_parts(file.spec, file.tensors) if file.spec.experts else None


def _streamed(file: ErtFile, slots: int, streaming: Streaming) -> tuple[Weights, Store]:
    """The weights without what is read when it is needed, and what reads that."""
    if file.spec.neurons:
        return neurons.open_streamed(file, slots, streaming)
    return experts.open_streamed(file, slots, streaming)


def _check_whole(file: ErtFile) -> None:
    """Refuse half a model: alone it has no answer to give."""
    spec = file.spec
    if spec.part:
        use = "serve it with `edgert cloud`" if spec.first_layer else "give --cloud HOST:PORT or --mode local"
        raise ModelFileError(
            f"{file.path}: found layers {spec.first_layer} to {spec.last_layer} of {spec.layers}, expected "
            f"all of them; {use}"
        )


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
