"""Where in a program the rows lie that meet each matrix."""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from edgert.format.tensors import expert_name
from edgert.kernels import program
from edgert.kernels.requests import TABLE
from edgert.model.forward import Forward
from edgert.state import Weights


@dataclass(frozen=True, slots=True)
class Tap:
    """A place to look at: before operation `at`, the rows that the matrices `names` are about to meet."""

    at: int
    names: tuple[str, ...]  # q, k and v of a layer meet the same rows
    operands: dict[str, int]  # of the operation
    layer: int = -1  # of experts and of gates: whose
    gates: bool = False  # the rows are what a layer's activation is about to be applied to


def find_taps(forward: Forward, weights: Weights) -> list[Tap]:
    """The taps of a program, in its order: one for all matrices that follow one another on the same rows.

    The rows of experts' gate and up are those of their layer's router; each expert's down has its own,
    which lie there until they are combined.
    """
    names = sorted((t.offset, t.name) for t in weights.tensors.values() if t.role in ("matrix", "router"))
    found: list[Tap] = []
    layer, inside, last = -1, {}, -1  # last: of the operations that the latest tap stands before
    for at, row in enumerate(forward.code):
        fields = program.FIELDS[int(row[0])]
        operands = dict(zip(fields, map(int, row[3:]), strict=False))
        if row[0] == program.EXPERTS:
            layer, inside = operands["table"] // (TABLE * weights.spec.experts), operands
        elif row[0] == program.COMBINE:
            downs = tuple(f"{expert_name(layer, e)}.down" for e in range(weights.spec.experts))
            found.append(Tap(at, downs, inside, layer))
        elif row[0] == program.GATE and found[-1].names[-1].endswith(".up"):
            inside = {"x": operands["g"], "x_stride": operands["stride"]}
            name = found[-1].names[-1]
            found.append(Tap(at, (name,), inside, int(name.split(".")[1]), gates=True))
        elif row[0] == program.MATMUL and row[1] != program.FORESEEN:
            # The last that starts there or before: a head has a part of a matrix (see linear_by_head).
            name = names[bisect(names, operands["w_at"], key=itemgetter(0)) - 1][1]
            if found and not found[-1].gates and found[-1].operands["x"] == operands["x"] and last + 1 == at:
                names_so_far = tuple(dict.fromkeys((*found[-1].names, name)))
                found[-1] = Tap(found[-1].at, names_so_far, found[-1].operands)
            else:
                found.append(Tap(at, (name,), operands))
            last = at
    return found


def rows_at(
    tap: Tap, forward: Forward, weights: Weights, count: int
) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
    """Names of matrices and the float32 rows [count, K] they meet: views, valid until the next operation.

    count: rows of the operation. Experts that none of the rows chose are left out.
    """
    f, routes, o = forward.state.f, forward.state.routes, tap.operands
    if tap.layer < 0 or tap.gates:
        width = weights.tensors[tap.names[0]].shape[0 if tap.gates else 1]
        rows = f[o["x"] : o["x"] + count * o["x_stride"]].reshape(count, o["x_stride"])
        yield tap.names, rows[:, :width]
        return
    stride = o["inner"] * 32
    for expert, name in enumerate(tap.names):
        first, last = routes[o["starts"] + expert], routes[o["starts"] + expert + 1]
        if last > first:
            rows = f[o["g"] + first * stride : o["g"] + last * stride].reshape(-1, stride)
            yield (name,), rows[:, : weights.spec.expert_width]
