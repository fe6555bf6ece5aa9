"""The one compiled function that executes a program (see program.py), with however many threads."""

from edgert.kernels import atomics, team
from edgert.kernels.experts import run_experts
from edgert.kernels.jit import inlined, jit
from edgert.kernels.program import AHEAD, EXPERTS, FIRST, FORESEEN, LAST, ROWS, TOKENS, WANTED
from edgert.kernels.units import run_unit, units_of


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
def _execute(
    me, threads, code, reals, w, pool, table, f, xq, xs, xn, kv, spare, spare_view, routes, rows, paths, job,
    ctl, tickets,
):  # fmt: skip
    i = until = job[FIRST]  # what lies before `until` this thread does alone, the others wait for it
    while i < job[LAST]:
        c, count, real, cap = code[i], _count(code[i], job), reals[i, 0], reals[i, 1]
        if c[0] == EXPERTS:
            run_experts(me, c, real, cap, w, pool, table, routes, f, xq, xs, xn)
        units, shared = units_of(c, count, routes), threads > 1 and i >= until
        unit = atomics.fetch_add(tickets, i, 1) if shared else 0
        while unit < units:
            run_unit(
                c, real, cap, unit, count, me, w, pool, table, f, xq, xs, xn, kv, spare, spare_view, routes,
                rows, paths, job,
            )  # fmt: skip
            unit = atomics.fetch_add(tickets, i, 1) if shared else unit + 1
        i += 1
        if i == until:
            team.let_go(ctl, threads)
        elif i > until and c[2]:
            # Single units that follow (the norm of one row) are done by the last to arrive while the others
            # wait for it in any case: one barrier instead of two.
            then = _past_singles(i, code, job, routes)
            if not team.arrive(ctl, threads):
                i = then
            elif then == i:
                team.let_go(ctl, threads)
            until = then


@jit
def enter(
    worker, workers, code, reals, w, pool, table, f, xq, xs, xn, kv, spare, spare_view, routes, rows, paths,
    job, ctl, tickets,
):  # fmt: skip
    """Thread 0 executes one job with whoever is ready; a worker (1, 2, ...) serves until it parks.

    One compiled entry for both, so that the kernels exist once in machine code.
    """
    if worker > 0:
        team.set_ready(ctl, worker)
    while True:
        if worker == 0:
            tickets[job[FIRST] : job[LAST]] = 0
            rank, threads = worker, team.claim(ctl, workers)
        else:
            rank = team.wait_for_rank(ctl, worker)
            if rank == 0:
                return
            threads = team.threads_claimed(ctl)
        # The only call: what it calls is all the machine code there is, and should be there once.
        _execute(
            rank, threads, code, reals, w, pool, table, f, xq, xs, xn, kv, spare, spare_view, routes, rows,
            paths, job, ctl, tickets,
        )  # fmt: skip
        if worker > 0:
            team.set_ready(ctl, worker)  # before the barrier: the leader may start the next job at once
        team.barrier(ctl, threads)
        if worker == 0:
            return
