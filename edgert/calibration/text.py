"""Which text a calibration runs over, and how the file says so."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edgert.errors import UsageError
from edgert.evaluate import read_documents
from edgert.tokenizer import Tokenizer

DEFAULT_TOKENS: Final = 32768
"""Four rows for each column of the widest input of a 1B model (8192), and an eighth of what GPTQ was
published with: more take longer in proportion, fewer leave the matrix of products to its damping."""
LEAST_TOKENS: Final = 64
"""Fewer rows than the smallest matrix has columns say little about any of them."""
CALIBRATION_KEY: Final = "calibration"
"""The metadata that says what calibrated a file: a JSON object of text, sha256 and tokens."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text as windows of tokens, each of which a model sees by itself."""

    windows: tuple[tuple[int, ...], ...]
    name: str  # of its file, without the folder
    sha256: str  # of its documents, one behind the other

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))

    def metadata(self) -> dict[str, str]:
        """What the file records."""
        found = {"text": self.name, "sha256": self.sha256, "tokens": self.tokens}
        return {CALIBRATION_KEY: json.dumps(found)}


def read_text(path: Path, tokenizer: Tokenizer, window: int, tokens: int) -> Text:
    """Windows of up to `window` tokens, evenly from the whole file, until there are about `tokens`.

    Raises UsageError for a file that is no text, or one with less than LEAST_TOKENS tokens.
    """
    documents = read_documents(path)
    digest = hashlib.sha256()
    found: list[tuple[int, ...]] = []
    for document in documents:
        digest.update(document.encode())
        ids = tokenizer.encode(document)
        found += [tuple(ids[start : start + window]) for start in range(0, len(ids), window)]
    total = sum(map(len, found))
    if total < LEAST_TOKENS:
        raise UsageError(f"{path}: found {total} tokens, expected at least {LEAST_TOKENS} to calibrate with")
    count = max(1, min(len(found), len(found) * tokens // total))
    chosen = np.linspace(0, len(found) - 1, count).astype(int)
    return Text(tuple(found[i] for i in chosen), path.name, digest.hexdigest())
