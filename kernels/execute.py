"""The one compiled entry that executes a program (see program.py), with however many threads."""

from edgert.kernels import atomics, team
from edgert.kernels.jit import inlined, jit, missing
from edgert.kernels.operations import OPERATIONS, call, unpack
from edgert.kernels.program import (
    AHEAD,
    EXPERTS,
    FIRST,
    FORESEEN,
    LAST,
    OF_EXPERTS,
    OF_NEURONS,
    ROWS,
    TOKENS,
    WANTED,
)
from edgert.kernels.units import units_of


def is_cached(experts: bool = True, neurons: bool = True) -> bool:
    """Whether all that models of a kind are computed with is in the cache: those with experts, those with
    neurons one by one, or those with neither."""
    without = set[int]().union(() if experts else OF_EXPERTS, () if neurons else OF_NEURONS)
    return not missing([enter, *(OPERATIONS[number] for number in OPERATIONS if number not in without)])


@jit
def _count(c, job):
    """Rows of an operation."""
    return job[ROWS] if c[1] == TOKENS else job[AHEAD] if c[1] == FORESEEN else job[WANTED]


@jit
def _past_singles(i, code, job, routes):
    """The first operation from `i` on that is more than one unit, or runs beside the next."""
    while i < job[LAST] and code[i, 2] and units_of(code[i], _count(code[i], job), routes) == 1:
        i += 1
    return i


@inlined
def _execute(packed, me, threads, ctl):
    run = unpack(packed)
    job = run.job
    i = until = job[FIRST]  # what lies before `until` this thread does alone, the others wait for it
    while i < job[LAST]:
        c = run.code[i]
        count = _count(c, job)
        if c[0] == EXPERTS:
            call(run.operations[EXPERTS], (packed, i, 0, count, me))
        units, shared = units_of(c, count, run.routes), threads > 1 and i >= until
        unit = atomics.fetch_add(run.tickets, i, 1) if shared else 0
        while unit < units:
            call(run.operations[c[0]], (packed, i, unit, count, me))
            unit = atomics.fetch_add(run.tickets, i, 1) if shared else unit + 1
        i += 1
        if i == until:
            team.let_go(ctl, threads)
        elif i > until and c[2]:
            # Single units that follow (the norm of one row) are done by the last to arrive while the others
            # wait for it in any case: one barrier instead of two.
            then = _past_singles(i, run.code, job, run.routes)
            if not team.arrive(ctl, threads):
                i = then
            elif then == i:
                team.let_go(ctl, threads)
            until = then


@jit
def enter(worker, workers, packed, ctl):
    """Thread 0 executes one job with whoever is ready; a worker (1, 2, ...) serves until it parks.

    One compiled entry for both. packed: of `operations.pack`.
    """
    run = unpack(packed)
    job = run.job
    if worker > 0:
        team.set_ready(ctl, worker)
    while True:
        if worker == 0:
            run.tickets[job[FIRST] : job[LAST]] = 0
            rank, threads = worker, team.claim(ctl, workers)
        else:
            rank = team.wait_for_rank(ctl, worker)
            if rank == 0:
                return
            threads = team.threads_claimed(ctl)
        _execute(packed, rank, threads, ctl)
        if worker > 0:
            team.set_ready(ctl, worker)  # before the barrier: the leader may start the next job at once
        team.barrier(ctl, threads)
        if worker == 0:
            return
