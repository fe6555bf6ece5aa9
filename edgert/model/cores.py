"""The neurons a sequence goes on with behind its prompt (CoreInfer, Wang et al., 2024, arXiv:2410.18311).

A token's core: of the neurons that add anything to its row, the TOKEN_SHARE that add most. A prompt's core:
of all neurons, the share `ModelSpec.core` that are in most of its tokens' cores. From then on the others are
taken for silent: neither their gates nor anything else of them is read.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.errors import UsageError

TOKEN_SHARE = 0.05
"""Of the neurons with h = act(gate) * up other than 0, by |h|: what a neuron adds is h times its column, and
a gate alone says less. CoreInfer takes 0.4. In both models of docs/sparsity.md less is better, as it is the
few large ones that count; much less, and the tokens of a short prompt do not name as many as a core has."""


class Cores:
    """Counts over prompts, and what is frozen of them, of every sequence of a cache.

    A count belongs to a prompt from its first position on, and cannot be taken back but for the newest: so
    `resume` says how far another prompt can share it. Trees are never part of a prompt.
    """

    def __init__(self, spec: ModelSpec, scores: NDArray[np.float32]) -> None:
        """scores: [S, L, F], written here and read by kernels: above zero for the neurons of a core."""
        self._scores = scores
        self._size = max(1, round(spec.core * spec.ffn_width))
        self._counts = np.zeros(scores.shape, np.int32)  # positions that have the neuron in their core
        self._newest = np.zeros(scores.shape, np.bool_)  # the core of the last of them
        self._counted = [0] * len(scores)  # positions there are, by sequence
        self._undoable = [False] * len(scores)  # whether _newest is known
        self.frozen = [False] * len(scores)
        self._rows: dict[int, list[int]] = {}  # of the forward in progress, those that count, by sequence
        self._seen: list[tuple[int, int, NDArray[np.bool_]]] = []  # of it: sequence, layer, cores [T, F]
        self._grows = False  # whether its rows are new positions

    @property
    def counting(self) -> bool:
        """Whether the forward in progress has rows of a prompt."""
        return bool(self._rows)

    def begin(self, sequences: Sequence[int], lengths: Sequence[int], tree: bool) -> None:
        """A forward begins, its rows of these sequences, behind `lengths` positions.

        Raises UsageError for rows of a prompt behind a rewind that was no `resume`.
        """
        self._seen, self._rows, self._grows = [], {}, True
        for row, sequence in enumerate(sequences):
            if lengths[sequence] == 0:
                self._forget(sequence)
            if not tree and not self.frozen[sequence]:
                self._rows.setdefault(sequence, []).append(row)
        for sequence in self._rows:
            if self._counted[sequence] != lengths[sequence]:
                raise UsageError(
                    f"a prompt that goes on behind {lengths[sequence]} positions, but its core was counted "
                    f"over {self._counted[sequence]}; rewind with Forward.resume"
                )

    def see(self, layer: int, h: NDArray[np.float32]) -> None:
        """What every neuron of a layer adds to the rows of the forward, times its column of down: [T, F]."""
        for sequence, rows in self._rows.items():
            self._seen.append((sequence, layer, token_cores(h[rows])))

    def end(self) -> None:
        """The forward is through: its rows count."""
        for sequence, layer, found in self._seen:
            self._counts[sequence, layer] += found.sum(axis=0, dtype=np.int32)
            self._newest[sequence, layer] = found[-1]
        self._seen = []
        for sequence, rows in self._rows.items() if self._grows else ():
            self._counted[sequence] += len(rows)
            self._undoable[sequence] = True
        self._grows = False  # a call that goes on with these rows in other layers adds no position

    def freeze(self, sequence: int) -> None:
        """The prompt is through: of equally frequent neurons the first are taken, which fire most."""
        if self.frozen[sequence]:
            return
        chosen = np.argsort(-self._counts[sequence], axis=1, kind="stable")[:, : self._size]
        self._scores[sequence] = 0
        np.put_along_axis(self._scores[sequence], chosen, np.float32(1), axis=1)
        self.frozen[sequence] = True

    def resume(self, shared: int, sequence: int) -> int:
        """How many of `shared` positions another prompt can begin with; counting goes on from there.

        All that were counted, or all but the last, which is computed again for its logits; else none.
        """
        if shared == self._counted[sequence] - 1 and self._undoable[sequence]:
            self._counts[sequence] -= self._newest[sequence]
            self._counted[sequence] = shared
            self._undoable[sequence] = False
        elif shared < self._counted[sequence]:
            self._forget(sequence)
        self.frozen[sequence] = False
        return self._counted[sequence]

    def _forget(self, sequence: int) -> None:
        if self._counted[sequence] or self.frozen[sequence]:
            self._counts[sequence] = 0
            self._counted[sequence] = 0
        self._undoable[sequence] = self.frozen[sequence] = False


def token_cores(h: NDArray[np.float32], share: float = TOKEN_SHARE) -> NDArray[np.bool_]:
    """Which neurons are in the core of each token, bool [T, F], by what they add to it, h [T, F].

    share: of those that add anything, rounded up; what is equal to the least of them is in it too.
    """
    size = np.abs(h)
    kept = np.ceil(share * np.count_nonzero(size, axis=1)).astype(np.int64)
    place = np.clip(size.shape[1] - kept, 0, size.shape[1] - 1)
    least = np.take_along_axis(np.sort(size, axis=1), place[:, None], axis=1)
    return (size >= least) & (size > 0)
