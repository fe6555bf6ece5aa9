"""Token-tree speculation: guess ahead, check all guesses in one forward, keep what is right."""

from edgert.speculation.setup import DEFAULT_TREE, Draft, Drafting, drafting

__all__ = ["DEFAULT_TREE", "Draft", "Drafting", "drafting"]
