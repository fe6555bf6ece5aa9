"""Perplexity of a model on a text."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import UsageError
from edgert.runtime import Model


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text."""

    perplexity: float  # per token
    bits_per_byte: float
    tokens: int  # predicted
    bytes: int  # of UTF-8 text, without what was given
    documents: int


def read_documents(path: Path, last: int | None = None) -> list[str]:
    """The documents of a file: the "text" of each line of a .jsonl, else the whole file as one.

    last: only so many at the end. Raises UsageError for a file that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; expected a text file or a .jsonl") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not UTF-8 at byte {error.start}; expected a text file or a .jsonl"
        ) from None
    documents = list(_lines(path, text)) if path.suffix == ".jsonl" else [text]
    if last is not None:
        documents = documents[-last:]
    if not any(documents):
        raise UsageError(f"{path}: no text in it")
    return documents


def evaluate(
    model: Model,
    documents: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    prompt: int = 1,
) -> Evaluation:
    """Score every document by itself; a long one in windows of the context that do not overlap.

    prompt: so many tokens at the start of a window are given, and counted is how the rest is predicted; the
    first has nothing before it in any case. A file with cores takes them for the prompt that these are of.
    progress(done, total) counts documents. Raises UsageError where there is nothing to predict.
    """
    cores = model.spec.core > 0 and model.config.predict
    if cores and prompt < 2:
        raise UsageError(
            "this file goes on with the neurons that a prompt used most; give the number of tokens that are "
            "the prompt, like 64, or sparsity none"
        )
    loss, tokens, size = 0.0, 0, 0
    for index, document in enumerate(documents):
        ids = model.tokenizer.encode(document)
        size += len(document.encode())
        for start in range(0, len(ids), model.config.context):
            window = ids[start : start + model.config.context]
            if len(window) > prompt:
                given = model.log_likelihoods(window, prompt if cores else None)
                loss -= float(given[prompt - 1 :].sum())
                tokens += len(window) - prompt
            size -= len(model.tokenizer.decode(window[1:prompt]).encode())
        if progress:
            progress(index + 1, len(documents))
    if not tokens:
        least = "two" if prompt == 1 else str(prompt + 1)
        raise UsageError(f"the text is shorter than {least} tokens; there is nothing to predict")
    return Evaluation(math.exp(loss / tokens), loss / math.log(2) / size, tokens, size, len(documents))


def _lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(f'{path}:{number}: expected {{"text": ...}} on every line') from None
            yield str(value)
