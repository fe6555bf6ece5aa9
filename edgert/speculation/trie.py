"""Every run of a few tokens that was seen, with how often: what followed the same words before."""

from collections.abc import Iterator, Sequence

ORDER = 8
"""Longest run held: seven tokens of context and what came after. Longer contexts hardly change what
follows, and each order costs one entry per token."""
MOST_NODES = 1 << 16
"""Runs held, some 15 MB of them; a text of ten thousand tokens. Past it the older half is forgotten."""


class TrieNode:
    """A run of tokens: how often it was seen, and what it was followed by."""

    __slots__ = ("count", "next")

    def __init__(self) -> None:
        self.count = 0
        self.next: dict[int, TrieNode] = {}


class NgramTrie:
    """All runs of up to ORDER tokens of the texts it was shown (the trie of Lookahead, PIA).

    `cursors` are the runs that end with the newest token, longest first: their continuations are
    what may come next, so a query costs nothing.
    """

    def __init__(self, most_nodes: int = MOST_NODES) -> None:
        self.cursors: list[TrieNode] = []
        self.history: list[int | None] = []  # what was shown; None between texts
        self.nodes = 0
        self._most = most_nodes
        self._root = TrieNode()

    def new_text(self) -> None:
        """What comes now does not follow what was shown last."""
        if self.history and self.history[-1] is not None:
            self.history.append(None)
        self.cursors = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Show the tokens that come next in the text."""
        for token in tokens:
            self.history.append(token)
            self._advance(token)
            if self.nodes > self._most:
                self._forget_half()

    def follow(self, cursors: list[TrieNode], token: int) -> list[TrieNode]:
        """The cursors after one more token, without learning it."""
        found = [cursor.next[token] for cursor in cursors if token in cursor.next]
        if token in self._root.next:
            found.append(self._root.next[token])
        return found

    def _advance(self, token: int) -> None:
        grown = []
        for node in (*self.cursors[-(ORDER - 1) :], self._root):
            below = node.next.get(token)
            if below is None:
                below = node.next[token] = TrieNode()
                self.nodes += 1
            below.count += 1
            grown.append(below)
        self.cursors = grown

    def _forget_half(self) -> None:
        """Start again with the newer half of what was shown."""
        rest = self.history[len(self.history) // 2 :]
        self.history, self.cursors, self.nodes, self._root = [], [], 0, TrieNode()
        for token in rest:
            self.history.append(token)
            if token is None:
                self.cursors = []
            else:
                self._advance(token)


def continuations(cursors: list[TrieNode], most: int) -> Iterator[tuple[int, float, int]]:
    """(token, probability, order of the context) of what followed, longest context first.

    A context seen n times in all gives what followed it n_i times the share n_i / (n + 1) of what the
    longer contexts left over; the rest is for the shorter ones (prediction by partial matching, with
    its method A: Cleary and Witten, 1984).
    """
    left, given = 1.0, set[int]()
    for place, cursor in enumerate(cursors):
        if not cursor.next:
            continue
        total = sum(node.count for node in cursor.next.values())
        for token, node in sorted(cursor.next.items(), key=lambda item: -item[1].count)[:most]:
            if token not in given:
                given.add(token)
                yield token, left * node.count / (total + 1), len(cursors) - place
        if len(given) >= most:
            return
        left /= total + 1
