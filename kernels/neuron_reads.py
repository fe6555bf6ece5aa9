"""Single neurons from flash: a layer asks for those that fire, and compiled threads read what is missing.

A neuron's row of up and column of down are a bundle: one piece of the file (neuron_packing.py), and one slot
of memory. A layer is through only when all that it asked for has come, so between two requests nobody reads:
whoever asks gives slots away by himself, and no lock is needed. A request is cut into runs, neurons that
lie next to each other or nearly so, and readers take one run after the other:

    asking:   slots for what is missing; runs; POSTED; the bell
    reading:  the run TAKEN; its bundles to their slots; their places; then they are listed as arrived

With more rows than single neurons are computed for, a layer is read as a whole instead, in large pieces.

All is in one int64 array, `table`: a place for each neuron, layer by layer (the byte of the pool where its
bundle lies, or ABSENT); then the control words; then the lists whose starts those give.
"""

import numpy as np

from edgert.kernels import atomics, files
from edgert.kernels.jit import jit

ABSENT = -1
CONTROL_WORDS = 40
(
    FAILED, CLOSING, HITS, MISSES, WAITED, BYTES, READS, POSTED, TAKEN, DONE, REQUEST, ARRIVED, WORD, LIVE,
    BUNDLE, HAND, DESCRIPTOR, BELL, HEARD, READERS, ALONE, GAP, LONGEST, PIECE, FIRST_SLOT, SLOT, SLOTS,
    PINNED, ALIGN, COUNTS, OWNERS, STAMPS, JOBS, RUNS, MOST_RUNS,
) = range(35)  # fmt: skip
"""Control words. Of a forward: FAILED, what it waits for will not come. Of all time: HITS, MISSES, neurons
that were there when asked for, or not; WAITED, nanoseconds the leader had nothing to do; BYTES, READS; runs
POSTED, TAKEN, DONE. Of the newest request: its number REQUEST; ARRIVED, how many of its neurons are listed;
WORD, the place of the layer's first neuron; LIVE, where its list in `routes` starts; BUNDLE, bytes of one.
HAND: the slot to be looked at next.

Set before: DESCRIPTOR of the file, below 0 where only Python can read; BELL and HEARD, the ends of a pipe;
READERS; ALONE: nothing is computed before all has come; GAP: bytes between two neurons that are read with
them; LONGEST: bytes of a run; PIECE: of one read; FIRST_SLOT, a byte of the pool, where SLOTS of SLOT bytes
start, the first PINNED of which are never given away; ALIGN, at multiples of which reads start and end.
Starts of lists: COUNTS, how often each neuron fires; of each slot OWNERS, who was given it last, and STAMPS,
the request that used it last; JOBS; RUNS, MOST_RUNS of them."""
JOB, RUN = 3, 6
"""Words of a job (neuron of the layer, byte of the pool, byte of its run), and of a run:"""
OFFSET, SPAN, WANTED, INTO, FIRST, COUNT = range(RUN)
"""Its byte in the file, its bytes, a multiple of ALIGN, and how many of them must come; the byte of the pool
where all of it goes, or ABSENT; and else the jobs that take it apart."""
USE = 16
"""What a use counts for; counts are halved from time to time (edgert/neurons/store.py)."""
CANDIDATES = 8
"""Slots that are compared for each that is needed; the least used goes. With room for 20% of the neurons of
the bundled target 8 of them keep 42% of what fires, 4 keep 38%, and all of them would keep 45%."""
SPINS = 500
"""Turns without news before a thread naps: some 10 us, where a read takes ten times that."""


@jit
def ask_live(word, file_at, cluster, bundle, live, control, routes, table):
    """Ask for the neurons of a layer at routes[live + 1] and behind; how many is in routes[live].

    They are listed anew: first those that are there, then ABSENT for each other one until it has arrived.
    word: the place of the layer's first neuron; cluster: bytes of 32 neurons and the scales before them, the
    first from byte `file_at` of the file; bundle: of one of them.
    """
    count, request = routes[live], table[control + REQUEST] + 1
    first_slot, slot_bytes = table[control + FIRST_SLOT], table[control + SLOT]
    posted, align = table[control + POSTED], table[control + ALIGN]
    counts, stamps, jobs = table[control + COUNTS], table[control + STAMPS], table[control + JOBS]
    table[control + REQUEST] = request
    there = missing = 0
    for i in range(count):
        n = routes[live + 1 + i]
        table[counts + word + n] += USE
        place = table[word + n]
        if place >= 0:
            table[stamps + (place - first_slot) // slot_bytes] = request
            routes[live + 1 + there] = n
            there += 1
        else:
            table[jobs + missing * JOB] = n
            missing += 1
    for i in range(there, count):
        routes[live + 1 + i] = ABSENT
    table[control + HITS] += there
    table[control + MISSES] += missing
    table[control + ARRIVED], table[control + WORD], table[control + LIVE] = there, word, live
    table[control + BUNDLE] = bundle
    runs = run = start = end = 0
    for i in range(missing):
        job = jobs + i * JOB
        n = table[job]
        at = file_at + n // 32 * cluster + cluster - (32 - n % 32) * bundle
        table[job + 1] = first_slot + _slot_for(word + n, request, control, table) * slot_bytes
        if runs == 0 or at - end > table[control + GAP] or at + bundle - start > table[control + LONGEST]:
            run = _run(posted + runs, control, table)
            runs += 1
            start = at // align * align
            table[run + OFFSET], table[run + INTO] = start, ABSENT
            table[run + FIRST], table[run + COUNT] = i, 0
        end = at + bundle
        table[job + 2] = at - start
        table[run + COUNT] += 1
        table[run + WANTED] = end - start
        table[run + SPAN] = (end - start + align - 1) // align * align
    _post(runs, control, table)


@jit
def ask_whole(file_at, nbytes, into, control, table):
    """Ask for a layer as it is in the file, to byte `into` of the pool."""
    piece, posted, align = table[control + PIECE], table[control + POSTED], table[control + ALIGN]
    runs = (nbytes + piece - 1) // piece
    for i in range(runs):
        run, at = _run(posted + i, control, table), i * piece
        wanted = min(piece, nbytes - at)
        table[run + OFFSET], table[run + WANTED] = file_at + at, wanted
        table[run + SPAN] = (wanted + align - 1) // align * align
        table[run + INTO], table[run + FIRST], table[run + COUNT] = into + at, 0, 0
    _post(runs, control, table)


@jit
def _run(number, control, table):
    """Where the words of a run are."""
    return table[control + RUNS] + number % table[control + MOST_RUNS] * RUN


@jit
def _post(runs, control, table):
    if runs > 0:
        atomics.store(table, control + POSTED, table[control + POSTED] + runs)
        files.ring_all(table[control + BELL], min(runs, table[control + READERS]))


@jit
def _slot_for(neuron, request, control, table):
    """A slot for the neuron with this place: of CANDIDATES that the request does not need, the least used."""
    slots, hand = table[control + SLOTS], table[control + HAND]
    counts, owners, stamps = table[control + COUNTS], table[control + OWNERS], table[control + STAMPS]
    best, least, seen = hand, np.int64(1) << 62, 0
    while seen < CANDIDATES and least >= 0:
        slot = hand
        hand = hand + 1 if hand + 1 < slots else table[control + PINNED]
        if table[stamps + slot] != request:
            owner = table[owners + slot]
            worth = table[counts + owner] if owner >= 0 else -1
            if worth < least:
                best, least = slot, worth
            seen += 1
    table[control + HAND] = hand
    owner = table[owners + best]
    # One whose read failed has no place, or another slot by now.
    if owner >= 0 and table[owner] == table[control + FIRST_SLOT] + best * table[control + SLOT]:
        table[owner] = ABSENT
    table[owners + best], table[stamps + best] = neuron, request
    return best


@jit
def wait_for(me, first, count, control, routes, table):
    """Return when routes[first : first + count] have arrived; False if they will not."""
    i = spins = 0
    since = np.int64(0)
    while i < count:
        if atomics.load(routes, first + i) >= 0:
            i += 1
            continue
        if atomics.load(table, control + FAILED):
            return False
        since = _pause(spins, since)
        spins += 1
    _waited(me, since, control, table)
    return True


@jit
def wait_for_all(me, control, table):
    """Return when everything that was asked for has come; False if it will not."""
    spins = 0
    since = np.int64(0)
    while atomics.load(table, control + DONE) < atomics.load(table, control + POSTED):
        if atomics.load(table, control + FAILED):
            return False
        since = _pause(spins, since)
        spins += 1
    _waited(me, since, control, table)
    return atomics.load(table, control + FAILED) == 0


@jit
def _pause(spins, since):
    if spins < SPINS:
        atomics.pause()
        return since
    if spins == SPINS:
        since = atomics.now()
    atomics.give_way()
    return since


@jit
def _waited(me, since, control, table):
    if me == 0 and since > 0:
        table[control + WAITED] += atomics.now() - since


# ---- the readers -----------------------------------------------------------------------------


@jit
def serve(control, table, pool, own, routes):
    """Read what is asked for, until the store closes (-1), or a run cannot be read here (its number).

    own: bytes of this reader, where runs arrive that are taken apart.
    """
    while True:
        if atomics.load(table, control + CLOSING):
            return -1
        number = atomics.load(table, control + TAKEN)
        if number == atomics.load(table, control + POSTED):
            files.hear(table[control + HEARD])
        elif atomics.exchange_if(table, control + TAKEN, number, number + 1):
            if atomics.load(table, control + FAILED):
                atomics.fetch_add(table, control + DONE, 1)
            elif _read(number, control, table, pool, own):
                deliver(number, control, table, pool, own, routes)
            else:
                return number


@jit
def _read(number, control, table, pool, own):
    """Whether enough of a run came."""
    run = _run(number, control, table)
    descriptor, span, into = table[control + DESCRIPTOR], table[run + SPAN], table[run + INTO]
    done = 0
    while descriptor >= 0 and done < span:
        size, at = min(span - done, table[control + PIECE]), table[run + OFFSET] + done
        if into >= 0:
            got = files.pread(descriptor, pool, into + done, size, at)
        else:
            got = files.pread(descriptor, own, done, size, at)
        done += max(got, 0)
        if got < size:
            break
    return done >= table[run + WANTED]


@jit
def deliver(number, control, table, pool, own, routes):
    """A run has come: its bundles go to their slots and are listed."""
    run, bundle = _run(number, control, table), table[control + BUNDLE]
    word, live = table[control + WORD], table[control + LIVE]
    for i in range(table[run + COUNT]):
        job = table[control + JOBS] + (table[run + FIRST] + i) * JOB
        n, place = table[job], table[job + 1]
        files.copy(pool, place, own, table[job + 2], bundle)
        atomics.store(table, word + n, place)
        atomics.store(routes, live + 1 + atomics.fetch_add(table, control + ARRIVED, 1), n)
    atomics.fetch_add(table, control + BYTES, table[run + SPAN])
    atomics.fetch_add(table, control + READS, 1)
    atomics.fetch_add(table, control + DONE, 1)


@jit
def give_up(number, control, table):
    """A run will not come."""
    atomics.store(table, control + FAILED, 1)
    atomics.fetch_add(table, control + DONE, 1)
