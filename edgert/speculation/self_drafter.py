"""Drafting with the target itself: its lower layers and an exit head, or its small activations left out."""

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.decoding import TokenSequence
from edgert.model.forward import WHOLE_AT_START, Forward
from edgert.speculation.forward_drafter import ForwardDrafter
from edgert.speculation.online import HeadCorrection
from edgert.speculation.tree import TokenTree


class SelfDrafter(ForwardDrafter):
    """Shares the target's weights and cache.

    Its rows lie behind the sequence in the target's cache, where the verification that follows writes
    the whole model's keys and values. So nothing of its tree outlives a step, and there is no catching up.
    """

    def __init__(self, name: str, spec: ModelSpec, last: int, learn: bool = False) -> None:
        """last: the layer before which a guess ends."""
        super().__init__(name, spec.vocab, HeadCorrection(spec.width) if learn else None)
        self._forward: Forward | None = None
        self._layers = (0, last)

    def begin(self, sequence: TokenSequence) -> None:
        """A new sequence has begun."""
        super().begin(sequence)
        self._forward = sequence.forward

    def extend(self, tree: TokenTree) -> bool:
        """The target is at work in the same buffers."""
        return False

    def settle(self, tree: TokenTree, path: list[int], last: int, places: dict[int, int]) -> None:
        """The verification was written over its rows."""
        self._learn(tree, path, last)
        self._forget()

    def _guess_rows(self, tokens: list[int], parents: list[int], behind: int) -> NDArray[np.float32]:
        """Logits after rows of the draft's tree, of which the first is the root."""
        assert self._forward is not None
        return self._forward.run(
            tokens, parents=parents, behind=behind, layers=self._layers, outputs=range(len(tokens))
        )

    def _room(self) -> int:
        assert self._forward is not None
        cache = self._forward.cache
        return cache.limit - cache.length - self._count - 1

    def _run_root(self, sequence: TokenSequence) -> NDArray[np.float32]:
        root: NDArray[np.float32] = self._guess_rows(sequence.tokens[-1:], [-1], 0)[0]
        return root

    def _run_rows(self, tokens: list[int], parents: list[int], behind: int) -> NDArray[np.float32]:
        return self._guess_rows(tokens, [parent + 1 for parent in parents], behind + 1)

    def _features(self, count: int) -> NDArray[np.float32]:
        assert self._forward is not None
        return self._forward.chosen(count)

    def _keep(self, rows: list[int]) -> None:
        """Nothing: see `settle`."""


class ExitDrafter(SelfDrafter):
    """A guess costs the layers below the first exit, and its head (Kangaroo, arXiv:2404.18911)."""

    def __init__(self, spec: ModelSpec, learn: bool = False) -> None:
        super().__init__("exit", spec, spec.exits[0], learn)


class SparseDrafter(SelfDrafter):
    """All layers, without small activations, or what else the file leaves out (Sirius, arXiv:2409.03856).

    For an engine that is `exact`: what is verified and kept is computed whole, so the output is the whole
    model's, and the sparse one's errors only cost guesses.
    """

    def __init__(self, spec: ModelSpec, learn: bool = False) -> None:
        super().__init__("sparse", spec, spec.layers, learn)

    def _guess_rows(self, tokens: list[int], parents: list[int], behind: int) -> NDArray[np.float32]:
        assert self._forward is not None
        whole, self._forward.whole = self._forward.whole, WHOLE_AT_START
        try:
            return super()._guess_rows(tokens, parents, behind)
        finally:
            self._forward.whole = whole
