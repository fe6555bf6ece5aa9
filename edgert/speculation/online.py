"""A draft that goes on learning: a small correction of its head, from the tokens the target chose.

Online Speculative Decoding (arXiv:2310.07177, section 3) distils into the whole draft while it serves; on
a board only the head is cheap enough. The correction never changes the output: it moves guesses only.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

MOST_TOKENS = 1024
"""Tokens with a correction of their own. A text has some hundred frequent ones; with a draft of width 64
all of them take 256 KiB and some ten microseconds a row."""
STEP = 0.5
"""Share of an error that one look corrects, at the same place: half, because the next place differs."""


class HeadCorrection:
    """logits[token] += delta[token] . (h, 1), for the tokens that were missed or wrongly guessed.

    delta is moved along the gradient of the cross-entropy, by a step that does not depend on the size
    of h (normalised least mean squares; Haykin, Adaptive Filter Theory, chapter 6):
    delta[t] += STEP * ((1 if t was seen else 0) - p[t]) * h / |h|^2.
    """

    def __init__(self, width: int) -> None:
        self._delta: F32 = np.zeros((MOST_TOKENS, width + 1), np.float32)
        self._ids = np.full(MOST_TOKENS, -1, np.int64)  # the token of each row of delta
        self._rows: dict[int, int] = {}  # and the row of each token
        self._next = 0

    def features(self, hidden: F32) -> F32:
        """Rows [T, D] with a constant beside them, a copy: float32 [T, D + 1]."""
        return np.concatenate([hidden, np.ones((len(hidden), 1), np.float32)], axis=1)

    def apply(self, logits: F32, features: F32) -> F32:
        """Logits [T, V], corrected: a copy."""
        corrected: F32 = logits.copy()
        count = len(self._rows)
        if count:
            corrected[:, self._ids[:count]] += features @ self._delta[:count].T
        return corrected

    def learn(self, features: F32, guesses: Sequence[tuple[int, float]], token: int) -> None:
        """After a place with these features [D + 1] the target chose `token`; the draft had guessed
        these tokens, with these probabilities."""
        stated = dict(guesses)
        step = np.float32(STEP) * features / np.dot(features, features)
        self._delta[self._row(token)] += np.float32(1.0 - stated.pop(token, 0.0)) * step
        for other, probability in stated.items():
            self._delta[self._row(other)] -= np.float32(probability) * step

    def _row(self, token: int) -> int:
        """The row of a token; a new one takes the place of the one that has been there longest."""
        if token not in self._rows:
            row, self._next = self._next, (self._next + 1) % MOST_TOKENS
            self._rows.pop(int(self._ids[row]), None)
            self._rows[token], self._ids[row] = row, token
            self._delta[row] = 0.0
        return self._rows[token]
