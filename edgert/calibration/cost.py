"""What leaving out a part of the feed-forwards costs, measured on the text of the calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edgert.evaluate import evaluate, read_documents
from edgert.runtime import load

MOST_CHARACTERS: Final = 40_000
"""Of the text: some ten thousand tokens. They tell the perplexity to about 1%, and the difference far better,
because both runs see the same."""
CORE_PROMPT: Final = 64
"""Tokens of each document that are its prompt, where that says which neurons it goes on with."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Perplexities of one file on one text."""

    whole: float
    sparse: float

    def __str__(self) -> str:
        change = self.sparse / self.whole - 1
        return f"perplexity on the text {self.whole:.3f} -> {self.sparse:.3f} ({change:+.2%})"


def sparsity_cost(file: Path, text: Path) -> Cost:
    """Perplexity of a file with thresholds, with and without them; documents from the end of the text.

    Of one with cores that of what follows CORE_PROMPT tokens.
    """
    documents: list[str] = []
    for document in reversed(read_documents(text)):
        documents.append(document[:MOST_CHARACTERS])
        if sum(map(len, documents)) >= MOST_CHARACTERS:
            break

    def perplexity(sparsity: Literal["auto", "none"]) -> float:
        with load(file, sparsity=sparsity) as model:
            return evaluate(model, documents, prompt=CORE_PROMPT if model.spec.core else 1).perplexity

    return Cost(perplexity("none"), perplexity("auto"))
