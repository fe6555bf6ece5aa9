"""Drafting with a forward pass: a draft model, or the target's own lower layers."""

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.decoding import TokenSequence
from edgert.kernels.exp_sum import exp_sum
from edgert.sampling import largest
from edgert.speculation.costs import RowCost
from edgert.speculation.drafter import Prices
from edgert.speculation.online import HeadCorrection
from edgert.speculation.tree import Guess, TokenTree
from edgert.speculation.trust import Trust

BRANCHES = 4
"""Most guesses after one node. LLMCad finds the second worth it above 30%; a fourth is hardly ever."""
LEAST_STATED = 0.02
"""A guess below this probability is not made, unless it is the best."""
BATCH = 8
"""Most nodes of one draft forward: rows that cost little more than one while weights are read."""
_LEAST_AHEAD = 0.02
"""Probability of a path that is still expanded while the target waits; trees hardly take others."""
_FIRST_HIT = 0.6
"""Share of best guesses taken to come true before any was seen."""


class ForwardDrafter(ABC):
    """Grows a tree best node first, some nodes per forward (EAGLE-2, section 4.1: expansion).

    A node is expanded when what it may add is worth its share of a draft forward and the rows it adds
    to the verification. What a subclass says is how rows are computed: `_run_root` and `_run_rows`.
    """

    def __init__(self, name: str, vocab: int, correction: HeadCorrection | None = None) -> None:
        self.name = name
        self.trust, self.cost = Trust(), RowCost()
        self.runs = 0  # forwards so far
        self._vocab = vocab
        self._temperature = 1.0
        self._hit = _FIRST_HIT  # mean probability of the best guess after a node
        self._rooted = False  # whether there are guesses after the tree's root
        self._rows: dict[int, int] = {}  # node: its row in the draft's own tree
        self._count = 0  # rows of that tree
        self._open: list[int] = []  # nodes that can be expanded
        self._correction = correction
        # Where it learns, of each node it guessed after: features [D + 1], and (token, probability).
        self._guessed: dict[int, tuple[NDArray[np.float32], list[tuple[int, float]]]] = {}
        self._depth = 0  # the deepest level that may be used

    def begin(self, sequence: TokenSequence) -> None:
        """A new sequence has begun."""
        self._forget()
        temperature = sequence.sampler.params.temperature
        self._temperature = temperature if temperature > 0 else 1.0

    def grow(self, tree: TokenTree, sequence: TokenSequence, prices: Prices) -> float:
        """Add nodes to the tree, as long as they are worth their price."""
        self._depth, late = prices.depth, 0.0
        if not self._rooted:
            late = self._catch_up(sequence)
            self._guess_after(tree, [0], self._run_root(sequence)[None])
            self._rooted = True
        while batch := self._batch(tree, prices):
            self._expand(tree, batch)
        return late

    def extend(self, tree: TokenTree) -> bool:
        """Expand the most probable node, whatever it costs, as long as it may be of use."""
        batch = [node for node in self._best(tree)[:1] if tree.logprobs[node] > np.log(_LEAST_AHEAD)]
        if batch:
            self._expand(tree, batch)
        return bool(batch)

    def settle(self, tree: TokenTree, path: list[int], last: int, places: dict[int, int]) -> None:
        """Keep the rows of what was taken; below it, the draft's tree goes on where it can."""
        if not self._rooted:
            return
        self._learn(tree, path, last)
        kept = 0
        while kept < len(path) and path[kept] in self._rows:
            kept += 1
        rows = [self._rows[node] for node in path[:kept]]
        next_root = next(iter(places), -1)
        if kept < len(path) or next_root not in self._rows:
            self._keep(rows)
            self._forget()
            return
        self._keep([*rows, self._rows[next_root]])
        shift = len(rows) + 1
        self._rows = {
            places[node]: row - shift
            for node, row in self._rows.items()
            if node in places and node != next_root
        }
        self._count -= shift
        self._open = [places[node] for node in self._open if node in places]
        self._guessed = {places[node]: said for node, said in self._guessed.items() if node in places}

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Nothing is held."""

    def _forget(self) -> None:
        self._rooted, self._rows, self._count, self._open = False, {}, 0, []
        self._guessed = {}

    def _best(self, tree: TokenTree) -> list[int]:
        """The nodes to expand next, most probable first."""
        within = [node for node in self._open if tree.depths[node] < self._depth]
        return sorted(within, key=lambda node: -tree.logprobs[node])[: min(BATCH, self._room())]

    def _batch(self, tree: TokenTree, prices: Prices) -> list[int]:
        """Those of them whose expected tokens are worth what they cost; [] where the forward is not."""
        best = self._best(tree)
        if not best or len(tree) > 2 * prices.nodes:
            return []
        one = self.cost.seconds(1)
        more = (self.cost.seconds(len(best)) - one) / max(1, len(best) - 1)
        ranked = tree.ranked()
        last = np.exp(tree.logprobs[ranked[prices.likely - 1]]) if len(ranked) >= prices.likely else 0.0
        each = max(last, prices.row + prices.second * max(0.0, more))
        worth = [self._hit * np.exp(tree.logprobs[node]) for node in best]
        batch = [node for node, value in zip(best, worth, strict=True) if value > each]
        gain = sum(worth[: len(batch)]) - prices.row * len(batch)
        return batch if gain > prices.second * self.cost.seconds(len(batch)) else []

    def _expand(self, tree: TokenTree, nodes: list[int]) -> None:
        began = time.perf_counter()
        parents = [self._rows.get(tree.parents[node], -1) for node in nodes]
        logits = self._run_rows([tree.tokens[node] for node in nodes], parents, self._count)
        for index, node in enumerate(nodes):
            self._rows[node] = self._count + index
            self._open.remove(node)
        self._guess_after(tree, nodes, logits)
        self._count += len(nodes)
        self.runs += 1
        self.cost.observe(len(nodes), time.perf_counter() - began)

    def _guess_after(self, tree: TokenTree, nodes: list[int], logits: NDArray[np.float32]) -> None:
        """Guess after every one of these nodes, given their logits [T, V]."""
        if self._correction is None:
            for index, node in enumerate(nodes):
                self._guess(tree, node, logits[index])
            return
        features = self._correction.features(self._features(len(nodes)))
        logits = self._correction.apply(logits, features)
        for index, node in enumerate(nodes):
            self._guessed[node] = features[index], self._guess(tree, node, logits[index])

    def _guess(self, tree: TokenTree, node: int, logits: NDArray[np.float32]) -> list[tuple[int, float]]:
        """Add the most probable tokens after a node; gives them, with their probabilities."""
        guesses = []
        ids = largest(logits[: self._vocab], BRANCHES)
        peak = logits[ids[0]]
        scaled: NDArray[Any] = logits
        if self._temperature != 1.0:
            scaled = (logits - peak) / np.float32(self._temperature)
            peak = np.float32(0.0)
        total = float(exp_sum(np.ascontiguousarray(scaled), peak))
        for place, token in enumerate(ids.tolist()):
            stated = float(np.exp(scaled[token] - peak)) / total
            if place and stated < LEAST_STATED:
                break
            guesses.append((token, stated))
            guess = Guess(self.name, stated, self.trust)
            if place == 0:
                self._hit += 0.02 * (guess.probability - self._hit)
            child = tree.add(node, token, guess)
            if child not in self._rows and child not in self._open:
                self._open.append(child)
        return guesses

    def _learn(self, tree: TokenTree, path: list[int], last: int) -> None:
        """Correct the head by what the target chose after the nodes it passed."""
        if self._correction is None:
            return
        for node, token in zip((0, *path), (*(tree.tokens[node] for node in path), last), strict=True):
            if node in self._guessed:
                self._correction.learn(*self._guessed[node], token)

    @abstractmethod
    def _room(self) -> int:
        """How many more rows the draft can hold."""

    def _catch_up(self, sequence: TokenSequence) -> float:
        """Compute what was missed, but for the newest tokens; the seconds it took."""
        return 0.0

    @abstractmethod
    def _run_root(self, sequence: TokenSequence) -> NDArray[np.float32]:
        """Logits [V] after the sequence's newest token."""

    @abstractmethod
    def _run_rows(self, tokens: list[int], parents: list[int], behind: int) -> NDArray[np.float32]:
        """Logits [T, V] after rows of the draft's tree; parent -1 is the root."""

    @abstractmethod
    def _features(self, count: int) -> NDArray[np.float32]:
        """What the logits of the last `count` rows were made of [T, D]: a view."""

    @abstractmethod
    def _keep(self, rows: list[int]) -> None:
        """These rows, from the top, are part of the sequence now; the others are forgotten or grow on."""
