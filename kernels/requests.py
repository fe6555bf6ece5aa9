"""How a running program asks for weights that are streamed: a table of places, and a ring of requests.

The program and a store (edgert/flash) share one int64 array. First come TABLE words per segment, group
by group: where it lies, and its precision. After them CONTROL words, then a ring of requests.

The program fills a request and only then moves NEWEST to it; it reads a place only after that. The store
takes a segment's place away first and then looks at the newest request: so either it sees that the
segment is needed, and puts it back, or who needs it sees that it is gone.
"""

from edgert.kernels import atomics
from edgert.kernels.jit import jit

TABLE = 2
"""Words per segment: the byte of the pool where it lies, or ABSENT; and its precision."""
ABSENT = -1

NEWEST, FAILED, STEP, HITS, MISSES, WAITED, BELL, SWAPPED, DROPPED, STOOD_IN = range(10)
CONTROL = 16
"""NEWEST: number of the last request; FAILED: the store gave up; STEP: of the caller, copied to requests;
HITS, MISSES: segments that were there when asked for, or not; WAITED: nanoseconds the leader had nothing to
do; BELL: the pipe that wakes the store; SWAPPED, DROPPED, STOOD_IN: of the approximations (sparing.py)."""
RING = 64
"""Requests kept: the store reads each once for its statistics, and may be late by some layers."""
GROUP, ROWS, STEP_OF, COUNT, AHEAD, HEAD = range(6)
"""Words of a request before its lists: COUNT members of GROUP are needed, AHEAD predictions (best first, with
repetitions). Then three lists of as many words as the largest group has members: the members needed; of each
member of the group its weight, in 2**-30; the predictions for the next group."""


@jit
def request_words(members):
    """Words of one request, where the largest group has so many members."""
    return HEAD + 3 * members


@jit
def newest_request(table, control):
    """The number of the last request; what it says may be read after this."""
    return atomics.load(table, control + NEWEST)


@jit
def place(table, word, at):
    """Say where a segment lies, or that it does not: everything written before is seen before this."""
    atomics.store(table, word, at)
