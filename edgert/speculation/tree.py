"""A tree of guessed tokens below the newest token of a sequence."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.speculation.trust import Trust
from edgert.state import MAX_OUTPUTS

MAX_NODES = MAX_OUTPUTS
"""Nodes that one verification can hold, the root among them: the rows of logits of one forward."""


class Guess(NamedTuple):
    """Who guessed a token, how surely, and how far that is believed."""

    drafter: str
    stated: float  # probability of the token after its parent, as the drafter has it
    trust: Trust

    @property
    def probability(self) -> float:
        """That the target takes the token, where it took the parent."""
        return self.trust.probability(self.stated)


@dataclass(slots=True)
class TokenTree:
    """Nodes in parallel lists; a node stands behind its parent. Node 0, the root, is the newest token
    of the sequence: committed, but not computed yet.

    A drafter may grow more nodes than are verified: `MAX_NODES` bounds what is verified.
    """

    root: int
    tokens: list[int] = field(init=False)  # [n] ids
    parents: list[int] = field(init=False)  # [n] nodes; -1 for the root
    depths: list[int] = field(init=False)  # [n] 0 for the root
    logprobs: list[float] = field(init=False)  # [n] natural: that the target takes the whole path
    guesses: list[Guess | None] = field(init=False)  # [n] None for the root
    children: list[dict[int, int]] = field(init=False)  # [n] from token to node

    def __post_init__(self) -> None:
        self.tokens, self.parents, self.depths, self.logprobs = [self.root], [-1], [0], [0.0]
        self.guesses, self.children = [None], [{}]

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, guess: Guess) -> int:
        """A guess that `token` follows `parent`. Where two guess the same there is one node: the surer's."""
        total = self.logprobs[parent] + math.log(guess.probability)
        known = self.children[parent].get(token)
        if known is None:
            return self._append(parent, token, guess, total)
        if total > self.logprobs[known]:
            self.logprobs[known], self.guesses[known] = total, guess
        return known

    def _append(self, parent: int, token: int, guess: Guess | None, logprob: float) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.logprobs.append(logprob)
        self.guesses.append(guess)
        self.children.append({})
        self.children[parent][token] = node
        return node

    def path(self, node: int) -> list[int]:
        """Nodes from below the root down to `node`."""
        nodes = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def mask(self) -> NDArray[np.bool_]:
        """Who sees whom, bool [n, n]: a row is its parent's row and itself (EAGLE-2, section 4.2)."""
        seen = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def ranked(self) -> list[int]:
        """All nodes but the root, the most probable path first.

        A child is never before its parent, so any number of them from the start are a tree.
        """
        return sorted(range(1, len(self)), key=lambda node: (-self.logprobs[node], node))

    def below(self, node: int) -> tuple["TokenTree", dict[int, int]]:
        """The tree whose root is `node`, and where each of its nodes was: {old node: new node}."""
        made, places = TokenTree(self.tokens[node]), {node: 0}
        for old in range(node + 1, len(self)):
            parent = self.parents[old]
            if parent in places:
                logprob = self.logprobs[old] - self.logprobs[node]
                places[old] = made._append(places[parent], self.tokens[old], self.guesses[old], logprob)
        return made, places
