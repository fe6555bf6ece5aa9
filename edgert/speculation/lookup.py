"""Drafting by looking up: what followed the same words before, in the prompt or in what was accepted."""

import math
import time
from pathlib import Path

import numpy as np

from edgert.decoding import TokenSequence, common_prefix
from edgert.errors import ModelFileError
from edgert.speculation.drafter import Prices
from edgert.speculation.tree import Guess, TokenTree
from edgert.speculation.trie import ORDER, NgramTrie, TrieNode, continuations
from edgert.speculation.trust import Trust

BRANCHES = 3
"""Most guesses after one node."""


class LookupDrafter:
    """Costs next to nothing, and is right where a text repeats itself: code, summaries, names.

    It adapts by itself: every accepted token is shown to the trie. How far a context of each length
    is believed is learned separately, because a match of one word is nearly worthless.
    """

    name = "lookup"

    def __init__(self, trie: NgramTrie | None = None) -> None:
        self.trie = trie or NgramTrie()
        self._trusts = [Trust() for _ in range(ORDER)]
        self._shown: list[int] = []  # the text that the trie's cursors stand at the end of

    def begin(self, sequence: TokenSequence) -> None:
        """A text that goes on from the last one is not shown twice."""
        shared = common_prefix(self._shown, sequence.tokens)
        if shared < len(self._shown) or not shared:
            self.trie.new_text()
            self._shown = []

    def grow(self, tree: TokenTree, sequence: TokenSequence, prices: Prices) -> float:
        """Learn what was accepted since, then follow the trie, most probable path first."""
        began = time.perf_counter()
        fresh = sequence.tokens[len(self._shown) :]
        self.trie.extend(fresh)
        self._shown += fresh
        late = time.perf_counter() - began if len(fresh) > prices.nodes else 0.0
        open_nodes: list[tuple[int, list[TrieNode]]] = [(0, self.trie.cursors)]
        least = math.log(max(prices.row, 1e-3))
        for _ in range(prices.nodes):
            if not open_nodes:
                break
            at = max(range(len(open_nodes)), key=lambda place: tree.logprobs[open_nodes[place][0]])
            node, cursors = open_nodes.pop(at)
            for token, stated, order in continuations(cursors, BRANCHES):
                guess = Guess(self.name, stated, self._trusts[min(order, ORDER) - 1])
                if tree.logprobs[node] + math.log(guess.probability) < least:
                    continue
                child = tree.add(node, token, guess)
                if tree.depths[child] < prices.depth:
                    open_nodes.append((child, self.trie.follow(cursors, token)))
        return late

    def extend(self, tree: TokenTree) -> bool:
        """A look takes no time worth waiting for: all was done before."""
        return False

    def settle(self, tree: TokenTree, path: list[int], last: int, places: dict[int, int]) -> None:
        """What was taken is learned when the next tree is grown."""

    def close(self) -> None:
        """Nothing is held."""


def read_store(path: Path, vocab: int) -> NgramTrie:
    """A trie shown the texts that `write_store` kept; an empty one where there is no file yet.

    Raises ModelFileError for a file that holds no tokens of this vocabulary.
    """
    trie = NgramTrie()
    if not path.exists():
        return trie
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ModelFileError(
            f"{path}: not a store of drafts ({error}); expected a file edgert wrote, or none"
        ) from None
    if kept.ndim != 1 or kept.dtype != np.int32 or (kept.size and not -1 <= kept.min() <= kept.max() < vocab):
        raise ModelFileError(
            f"{path}: a store of drafts for another model; expected token ids below {vocab}; delete it, "
            "or give another file"
        )
    for text in np.split(kept, np.flatnonzero(kept < 0)):
        trie.new_text()
        trie.extend([int(token) for token in text if token >= 0])
    trie.new_text()
    return trie


def write_store(path: Path, trie: NgramTrie) -> None:
    """Keep what the trie was shown: int32 ids, -1 between texts; the old file stays whole until replaced."""
    kept = np.array([-1 if token is None else token for token in trie.history], np.int32)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        np.save(file, kept, allow_pickle=False)
    fresh.replace(path)
