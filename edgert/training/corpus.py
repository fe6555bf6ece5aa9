"""The text of a training run: which tokens are learned from, in what order, and which are held out."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgert.errors import UsageError
from edgert.evaluate import read_documents

LEAST_ROWS: Final = 16
"""Rows of training text below which nothing but the text itself would be learned."""
LEAST_HELD_OUT: Final = 256
"""Tokens below which a measured agreement says nothing: its error would be 3 points and more."""
MOST_HELD_OUT: Final = 40_000
"""Tokens that are measured on, at most: errors of a quarter of a point, in seconds."""
HELD_OUT_SHARE: Final = 10  # one in so many, where the text has fewer documents than are to be held out


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenised text."""

    stream: NDArray[np.int32]  # all documents to learn from, shuffled, one behind the other
    held_out: tuple[NDArray[np.int32], ...]  # documents that are only measured on
    digest: str  # SHA-256 of the stream: two runs on the same text have the same

    def rows(self, step: int, count: int, tokens: int) -> NDArray[np.int64]:
        """Rows [count, tokens] for one step: consecutive text, in another order each epoch.

        A function of its arguments alone, so that a resumed run sees what an uninterrupted one would
        have.
        """
        per_epoch = max(1, (len(self.stream) - tokens) // (count * tokens))
        epoch, index = divmod(step, per_epoch)
        random = np.random.default_rng([epoch, tokens])
        # Each epoch cuts the text elsewhere, so that the same tokens stand at other positions.
        spare = len(self.stream) - per_epoch * count * tokens
        start = random.integers(max(1, spare)) + random.permutation(per_epoch)[index] * count * tokens
        at = start + np.arange(count)[:, None] * tokens + np.arange(tokens)
        return self.stream[at % len(self.stream)].astype(np.int64)


def read_corpus(
    path: Path,
    tokenizer_json: Path,
    *,
    vocab: int,
    eos: int | None,
    held_out: int,
    row_tokens: int,
    seed: int,
) -> Corpus:
    """Read a .txt or .jsonl file and tokenise it as the model does.

    held_out: how many documents at the end of the file are only measured on; at most a tenth of them, and
    a tenth of the tokens where there are fewer than ten. eos: the token that ends a document.

    Raises UsageError for a text that is too short, or a tokenizer that is not the model's.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    documents = [text for text in read_documents(path) if text.strip()]
    end = [] if eos is None else [eos]
    encoded = [np.array([*e.ids, *end], np.int32) for e in tokenizer.encode_batch(documents)]
    largest = max(int(ids.max(initial=0)) for ids in encoded)
    if largest >= vocab:
        raise UsageError(
            f"{tokenizer_json}: found token {largest} in {path.name}, expected ids below the model's "
            f"vocabulary of {vocab}; use the tokenizer.json that belongs to the model"
        )
    learned, measured = _split(encoded, held_out)
    order = np.random.default_rng(seed).permutation(len(learned))
    stream = np.concatenate([learned[i] for i in order])
    for what, found, least in (
        ("learn from", len(stream), LEAST_ROWS * row_tokens),
        ("hold out", sum(map(len, measured)), LEAST_HELD_OUT),
    ):
        if found < least:
            raise UsageError(
                f"{path}: found {found} tokens to {what}, expected at least {least}; give more text"
            )
    return Corpus(stream, measured, hashlib.sha256(stream.tobytes()).hexdigest())


def _split(
    documents: list[NDArray[np.int32]], held_out: int
) -> tuple[list[NDArray[np.int32]], tuple[NDArray[np.int32], ...]]:
    """Documents to learn from and to measure on, the latter cut where they come to MOST_HELD_OUT."""
    if len(documents) < HELD_OUT_SHARE:
        tokens = np.concatenate(documents)
        cut = len(tokens) - len(tokens) // HELD_OUT_SHARE
        return [tokens[:cut]], (tokens[cut:][:MOST_HELD_OUT],)
    count = min(held_out, len(documents) // HELD_OUT_SHARE)
    measured, total = [], 0
    for document in documents[-count:]:
        measured.append(document[: MOST_HELD_OUT - total])
        total += len(measured[-1])
    return documents[:-count], tuple(document for document in measured if len(document))
