"""Where the rows of a forward stand: their positions, their slots in the cache, their ancestors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ContextLengthError, UsageError
from edgert.kernels.program import DIRECT, PATH, POSITION, SEQUENCE, SLOT
from edgert.kv_cache import KvCache
from edgert.state import MAX_OUTPUTS, RunState


def place(
    state: RunState,
    cache: KvCache,
    count: int,
    parents: Sequence[int] | None,
    behind: int,
    sequences: Sequence[int] | None,
) -> None:
    """Fill in `state.rows` and, for a token tree, `state.paths`; arguments as of `Forward.run`.

    Raises ContextLengthError where a sequence has no room, UsageError for parents that make no tree.
    """
    if parents is None and sequences is None:
        cache.room_for(count)
        state.tree.clear()
        _place_line(state.rows, cache.length, count)
    else:
        _place_rows(state, cache, count, parents, behind, sequences or [0] * count)


def _place_line(rows: NDArray[np.int64], base: int, count: int) -> None:
    """The plain case, kept short: it is run for every token."""
    rows[SEQUENCE, :count] = 0
    rows[POSITION, :count] = rows[SLOT, :count] = np.arange(base, base + count)
    rows[DIRECT, :count] = np.arange(base + 1, base + count + 1)


def _place_rows(
    state: RunState,
    cache: KvCache,
    count: int,
    parents: Sequence[int] | None,
    behind: int,
    sequences: Sequence[int],
) -> None:
    if parents is not None and count > MAX_OUTPUTS:
        raise ContextLengthError(f"a tree of {count} nodes, expected at most {MAX_OUTPUTS}")
    if not 0 <= behind <= len(state.tree) or (behind and any(sequences)):
        raise UsageError(
            f"{behind} rows behind, expected at most the {len(state.tree)} of the tree of the first sequence"
        )
    for sequence in set(sequences):
        if not 0 <= sequence < len(cache.lengths):
            raise UsageError(f"a row of sequence {sequence}; the cache holds {len(cache.lengths)}")
        cache.room_for(behind + sum(s == sequence for s in sequences), sequence)
    del state.tree[behind:]
    rows, slots = state.rows, list(cache.lengths)
    slots[0] += behind
    for row, sequence in enumerate(sequences):
        rows[SEQUENCE, row] = sequence * cache.sequence_bytes
        slot = rows[SLOT, row] = slots[sequence]
        if parents is None:
            rows[POSITION, row] = slot
            rows[DIRECT, row] = slot + 1
        else:
            parent = parents[row]
            if not -1 <= parent < behind + row or (
                not behind and parent >= 0 and sequences[parent] != sequence
            ):
                raise UsageError(f"row {row} of a tree has parent {parent}, expected -1 or an earlier row")
            _place_node(state, cache.lengths[sequence], row, parent, slot)
        slots[sequence] += 1


def _place_node(state: RunState, base: int, row: int, parent: int, slot: int) -> None:
    """A node of a tree that grows behind position `base` of its sequence."""
    path = [*(state.tree[parent] if parent >= 0 else ()), slot]
    if len(path) > PATH:
        raise UsageError(f"a tree of more than {PATH} levels")
    state.tree.append(path)
    state.paths[row * PATH : row * PATH + len(path)] = path
    state.rows[POSITION, row] = base + len(path) - 1
    state.rows[DIRECT, row] = base
