"""The thread team: threads that execute one program together (see execute.py).

Why not numba's `prange`: its launch costs 24 to 130 us, a spin barrier 0.2 us. Each worker is a
Python thread that stays in compiled code, without the interpreter lock, as long as work keeps
coming, and parks on a lock when none came for a while.

A worker is PARKED, READY (spinning), RESERVED, or CLAIMED + r as thread r of a program. The leader
takes whoever is READY when a program starts, so nobody is ever waited for who may not come; that is
allowed because no result depends on the number of threads.
"""

from edgert.kernels import atomics
from edgert.kernels.jit import jit

# Words of the control array, 64 bytes apart so that no two share a cache line.
_ARRIVED, _PHASE, _THREADS, _STATUS = 0, 8, 16, 24
PARKED, WAKING, READY, RESERVED, CLAIMED = 0, 1, 2, 3, 4

SPINS = 2000
"""Pauses at a barrier before the thread naps: some 50 us, longer than most imbalances of threads that
all have a core."""
EAGER = 20_000
"""Pauses without work before a worker naps: half a millisecond, longer than sampling a token takes."""
NAPS = 100
"""Naps without work before a worker parks: some 7 ms."""


def control_words(workers: int) -> int:
    """Length of the int64 control array for this many workers."""
    return _STATUS + 8 * (workers + 1)


@jit
def status_word(worker):
    """Where the status of worker 1, 2, ... lies."""
    return _STATUS + 8 * worker


@jit
def arrive(ctl, threads):
    """True, at once, for the last thread of the program to come here, False for the others when that one
    has called `let_go`."""
    if threads == 1:
        return True
    phase = atomics.load(ctl, _PHASE)
    if atomics.fetch_add(ctl, _ARRIVED, 1) == threads - 1:
        return True
    spins = 0
    while atomics.load(ctl, _PHASE) == phase:
        spins += 1
        if spins < SPINS:
            atomics.pause()
        else:
            atomics.give_way()
    return False


@jit
def let_go(ctl, threads):
    """Open the barrier at which the others wait."""
    if threads > 1:
        atomics.store(ctl, _ARRIVED, 0)
        atomics.fetch_add(ctl, _PHASE, 1)


@jit
def barrier(ctl, threads):
    """Return when all threads of the program have come here."""
    if arrive(ctl, threads):
        let_go(ctl, threads)


@jit
def wake(ctl, worker):
    """Mark a parked worker as waking; True if it must be rung for."""
    return atomics.exchange_if(ctl, status_word(worker), PARKED, WAKING)


@jit
def claim(ctl, workers):
    """Take every READY worker into the program about to start; the number of its threads."""
    threads = 1
    for worker in range(1, workers + 1):
        if atomics.exchange_if(ctl, status_word(worker), READY, RESERVED):
            threads += 1
    atomics.store(ctl, _THREADS, threads)
    rank = 1
    for worker in range(1, workers + 1):
        if atomics.load(ctl, status_word(worker)) == RESERVED:
            atomics.store(ctl, status_word(worker), CLAIMED + rank)
            rank += 1
    return threads


@jit
def threads_claimed(ctl):
    """How many threads the current program has."""
    return atomics.load(ctl, _THREADS)


@jit
def set_ready(ctl, worker):
    """Offer this worker for the next program."""
    atomics.store(ctl, status_word(worker), READY)


@jit
def wait_for_rank(ctl, worker):
    """Spin until claimed and give the rank, or park and give 0."""
    spins = 0
    while True:
        status = atomics.load(ctl, status_word(worker))
        if status > CLAIMED:
            return status - CLAIMED
        spins += 1
        if spins < EAGER:
            atomics.pause()
        elif spins < EAGER + NAPS:
            atomics.give_way()
        elif atomics.exchange_if(ctl, status_word(worker), READY, PARKED):
            return 0
