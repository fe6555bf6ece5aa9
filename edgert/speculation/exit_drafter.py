"""Drafting with the target's own lower layers and an exit head (Kangaroo, arXiv:2404.18911)."""

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.decoding import TokenSequence
from edgert.model.forward import Forward
from edgert.speculation.forward_drafter import ForwardDrafter
from edgert.speculation.online import HeadCorrection
from edgert.speculation.tree import TokenTree


class ExitDrafter(ForwardDrafter):
    """Shares the target's weights and cache: a guess costs the layers below the first exit, and its head.

    Its rows lie behind the sequence in the target's cache, where the verification that follows writes
    the same keys and values again. So nothing of its tree outlives a step, and there is no catching up.
    """

    def __init__(self, spec: ModelSpec, learn: bool = False) -> None:
        super().__init__("exit", spec.vocab, HeadCorrection(spec.width) if learn else None)
        self._forward: Forward | None = None
        self._layers = (0, 0)

    def begin(self, sequence: TokenSequence) -> None:
        """A new sequence has begun."""
        super().begin(sequence)
        self._forward = sequence.forward
        self._layers = (0, sequence.forward.spec.exits[0])

    def extend(self, tree: TokenTree) -> bool:
        """The target is at work in the same buffers."""
        return False

    def settle(self, tree: TokenTree, path: list[int], last: int, places: dict[int, int]) -> None:
        """The verification was written over its rows."""
        self._learn(tree, path, last)
        self._forget()

    def _room(self) -> int:
        assert self._forward is not None
        cache = self._forward.cache
        return cache.limit - cache.length - self._count - 1

    def _run_root(self, sequence: TokenSequence) -> NDArray[np.float32]:
        assert self._forward is not None
        root: NDArray[np.float32] = self._forward.run(
            sequence.tokens[-1:], parents=[-1], layers=self._layers, outputs=[0]
        )[0]
        return root

    def _run_rows(self, tokens: list[int], parents: list[int], behind: int) -> NDArray[np.float32]:
        assert self._forward is not None
        above = [parent + 1 for parent in parents]  # row 0 is the root
        return self._forward.run(
            tokens, parents=above, behind=behind + 1, layers=self._layers, outputs=range(len(tokens))
        )

    def _features(self, count: int) -> NDArray[np.float32]:
        assert self._forward is not None
        return self._forward.chosen(count)

    def _keep(self, rows: list[int]) -> None:
        """Nothing: see `settle`."""
