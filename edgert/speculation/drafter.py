"""What every drafter does: guesses that fill a tree, at the prices of the step."""

from dataclasses import dataclass
from typing import Protocol

from edgert.decoding import TokenSequence
from edgert.speculation.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Prices:
    """What guesses cost in one step, all in tokens: what the machine would produce in the same time."""

    second: float  # tokens it produces in a second, as it goes now
    row: float  # verifying one more row
    depth: int  # the deepest level that may still be used
    nodes: int  # most nodes that are verified, without the root
    likely: int  # how many are likely to be: what ranks behind them is hardly worth growing


class Drafter(Protocol):
    """Guesses how a sequence goes on. One tree may be filled by several, each with nodes of its own.

    After a step the tree that was grown either has a node for the token that came, and what stands
    below it is the start of the next tree, or all is forgotten: `settle` says which.
    """

    name: str

    def begin(self, sequence: TokenSequence) -> None:
        """A new sequence has begun."""

    def grow(self, tree: TokenTree, sequence: TokenSequence, prices: Prices) -> float:
        """Add nodes to the tree, as long as they are worth their price.

        Gives the seconds spent on catching up with what came while it was not asked: the price of
        having rested, not of guessing.
        """

    def extend(self, tree: TokenTree) -> bool:
        """Grow on a little without asking the price, in time that is free; False: there is nothing to do."""

    def settle(self, tree: TokenTree, path: list[int], last: int, places: dict[int, int]) -> None:
        """The target took the nodes of `path`, and then chose the token `last`.

        places: from the nodes below that token to the nodes of the next tree; empty where the tree
        had no such node. The sequence's tokens include all that was taken.
        """

    def close(self) -> None:
        """Give back what it holds."""
