"""Operations as functions of their own: none is missing, and what they are given is what is there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core.errors import TypingError

from edgert.kernels import execute, jit, operations, program
from edgert.kernels.operations import OPERATIONS, PRODUCT, Run, pack


def arrays() -> dict[str, np.ndarray]:
    """Small arrays of a run, each with its own numbers."""
    found = {}
    for k, (name, kind) in enumerate(zip(Run._fields[:-1], operations._KINDS[:-1], strict=True)):
        shape = (2, 3 + k) if kind.ndim == 2 else (4 + k,)
        found[name] = np.full(shape, k, kind.dtype.name)
    return found


def test_every_operation_of_a_program_has_a_function() -> None:
    assert execute.enter is not None  # the import that enters them
    assert set(OPERATIONS) == set(program.FIELDS) | {PRODUCT}
    assert sorted(OPERATIONS) == list(range(len(OPERATIONS)))


@pytest.mark.compiled
def test_an_unpacked_run_is_the_arrays_that_were_packed() -> None:
    @jit.jit
    def add_up(packed, totals):  # type: ignore[no-untyped-def]
        run = operations.unpack(packed)
        totals[0] = run.code.sum()
        totals[1] = run.xq.sum() + run.rows[1, run.rows.shape[1] - 1]
        totals[2] = run.tickets[run.tickets.size - 1] + run.reals[1, run.reals.shape[1] - 1]
        totals[3] = run.w.sum() + run.kv.size + run.xn.sum()
        run.job[2] = 77

    kept = arrays()
    totals = np.zeros(4, np.int64)
    add_up(pack(Run(**kept)), totals)
    assert totals.tolist() == [
        kept["code"].sum(),
        kept["xq"].sum() + kept["rows"][-1, -1],
        kept["tickets"][-1] + kept["reals"][-1, -1],
        kept["w"].sum() + kept["kv"].size + kept["xn"].sum(),
    ]
    assert kept["job"].tolist().count(77) == 1


@pytest.mark.compiled
@pytest.mark.parametrize(
    "wrong", [np.zeros(4, np.float64), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]]
)
def test_an_array_of_another_kind_is_not_packed(wrong: np.ndarray) -> None:
    with pytest.raises(AssertionError, match="f is"):
        pack(Run(**(arrays() | {"f": wrong})))


@pytest.mark.compiled
def test_only_what_a_program_has_is_compiled_for_it() -> None:
    found = operations.addresses({program.EMBED, program.QUANTIZE})
    assert set(np.flatnonzero(found)) == {program.EMBED, program.QUANTIZE}
    assert len(found) == len(OPERATIONS)


@pytest.mark.compiled
def test_what_is_not_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_root", tmp_path)
    folder = jit.cache_folder()
    assert folder is not None
    functions = [OPERATIONS[program.EMBED], OPERATIONS[PRODUCT], execute.enter]
    assert jit.missing(functions) == ["units._embed", "matmul.matmul", "execute.enter"]
    (folder / "matmul.matmul-82.py311.1.nbc").write_bytes(b"code")
    (folder / "units._embed-9.py311.nbi").write_bytes(b"an index alone")
    assert jit.missing(functions) == ["units._embed", "execute.enter"]
    assert not execute.is_cached()


@pytest.mark.compiled
def test_a_dense_model_needs_no_operation_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(execute, "missing", lambda functions: asked.extend(functions))
    execute.is_cached(experts=False, neurons=False)
    assert OPERATIONS[program.ATTEND] in asked
    assert OPERATIONS[program.EXPERTS] not in asked
    assert OPERATIONS[program.NEURONS_UP] not in asked
    asked.clear()
    execute.is_cached()
    assert len(asked) == len(OPERATIONS) + 1


@pytest.mark.compiled
def test_an_error_in_an_operation_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an index out of bounds under NUMBA_BOUNDSCHECK=1."""

    @jit.jit
    def fails(packed, i, unit, rows, me):  # type: ignore[no-untyped-def]
        if unit == 3:
            raise IndexError("beyond the end")

    @jit.jit
    def one(packed, addresses, unit):  # type: ignore[no-untyped-def]
        operations.call(addresses[program.TAKE], (packed, 0, unit, 1, 0))
        return unit

    monkeypatch.setitem(OPERATIONS, program.TAKE, fails)
    monkeypatch.setattr(operations, "_found", {})
    found, packed = operations.addresses({program.TAKE}), np.zeros(4, np.int64)
    assert one(packed, found, 2) == 2
    with pytest.raises(IndexError, match="beyond the end"):
        one(packed, found, 3)


@pytest.mark.compiled
def test_a_call_with_other_arguments_is_not_compiled() -> None:
    @jit.jit
    def wrong(packed, addresses):  # type: ignore[no-untyped-def]
        operations.call(addresses[program.TAKE], (packed, 0, 1.5, 1, 0))

    with pytest.raises(TypingError, match="expected"):
        wrong(np.zeros(4, np.int64), np.zeros(40, np.int64))


@pytest.mark.compiled
def test_a_compilation_that_is_interrupted_leaves_nothing_half_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def compile(self, signature: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(OPERATIONS, program.TAKE, Interrupted())
    monkeypatch.setattr(operations, "_found", {})
    monkeypatch.setattr(operations, "missing", lambda functions: [])
    with pytest.raises(KeyboardInterrupt):
        operations.addresses({program.QUANTIZE, program.TAKE})
    monkeypatch.undo()
    assert operations.addresses({program.QUANTIZE, program.TAKE}).astype(bool).sum() == 2


@pytest.mark.compiled
def test_what_is_packed_holds_the_addresses_itself() -> None:
    packed = pack(Run(**arrays()))
    at = 3 * Run._fields.index("operations")
    assert packed[at] == packed.ctypes.data + 8 * (len(packed) - len(OPERATIONS))
    assert packed[-len(OPERATIONS) :][program.EMBED] != 0
