"""The thread team: whoever comes, every program is computed whole; and nothing is left behind."""

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from edgert.kernels import program, team
from edgert.kernels.operations import Run
from edgert.team import Team
from tests import kernel_inputs as inputs

pytestmark = pytest.mark.compiled

WIDTH, ROWS, VOCAB, PRODUCTS = 128, 3, 16, 6


def stored(matrix: inputs.F32) -> inputs.U8:
    """A matrix [N, K] of whole blocks and groups as f32 records: for each k its 16 rows."""
    rows, columns = matrix.shape
    cut = matrix.reshape(rows // 16, 16, columns // 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(cut).reshape(-1).view(np.uint8)


class Little:
    """An embedding of small whole numbers, then products with a permutation: every result is exact.

    Each unit is 16 outputs of a product, and needs all units of the one before: a barrier that does
    not hold shows, and so does a unit computed twice or not at all.
    """

    def __init__(self, threads: int) -> None:
        values = (np.arange(VOCAB)[:, None] * 37 + np.arange(WIDTH) * 11) % 101 - 50
        self.values = values.astype(np.float32)  # [VOCAB, WIDTH]
        self.order = np.arange(WIDTH) * 53 % WIDTH  # row n of the permutation picks column order[n]
        permutation = np.zeros((WIDTH, WIDTH), np.float32)
        permutation[np.arange(WIDTH), self.order] = 1
        table = stored(self.values)
        w = np.concatenate([table, stored(permutation)])
        w.flags.writeable = False  # as a mapped file: the program is compiled once for both
        code = [
            program.encode(
                *(program.EMBED, program.TOKENS, True),
                quant=0,
                w_at=0,
                groups=WIDTH // 32,
                word=program.TOKEN,
                y=0,
                y_stride=WIDTH,
                sum=-1,
                sum_stride=0,
            )
        ]
        for n in range(PRODUCTS):
            x, y = n * ROWS * WIDTH, (n + 1) * ROWS * WIDTH
            matrix = {"quant": 0, "w_at": table.size, "groups": WIDTH // 32, "blocks": WIDTH // 16}
            places = {"x": x, "x_stride": WIDTH, "xq": -1, "y": y, "y_stride": WIDTH}
            # Some are one unit, which the last thread at the barrier before it does; 3 and 4 in a row.
            unit = WIDTH // 16 if n in (0, 3, 4) else 1
            how = {"unit": unit, "bias": -1, "keep": 0, "most": 8, "ahead": 16}
            code.append(program.encode(program.MATMUL, program.TOKENS, True, **how, **matrix, **places))
        self.f = np.zeros((PRODUCTS + 1) * ROWS * WIDTH, np.float32)
        self.rows = np.zeros((program.TOKEN_WORDS, ROWS), np.int64)
        self.job = np.zeros(program.JOB_WORDS, np.int64)
        self.job[program.LAST] = len(code)
        bytes_, words = np.zeros(1, np.uint8), np.zeros(2, np.int64)
        run = Run(
            code=np.stack(code),
            reals=np.zeros((len(code), 2), np.float32),
            w=w,
            pool=w,
            table=words,
            f=self.f,
            xq=np.zeros(32, np.int8),
            xs=np.zeros(1, np.float32),
            xn=np.zeros(1, np.int32),
            kv=bytes_,
            spare=bytes_,
            routes=words,
            rows=self.rows,
            paths=np.zeros(program.PATH, np.int64),
            job=self.job,
        )
        self.team = Team(threads, run)

    def check(self, round_: int) -> None:
        """Run one program of some tokens and compare every number."""
        count = round_ % ROWS + 1
        tokens = (np.arange(count) * 7 + round_) % VOCAB
        self.rows[program.TOKEN, :count] = tokens
        self.job[program.ROWS] = count
        self.f[:] = 1000
        self.team.run()
        found = self.f.reshape(PRODUCTS + 1, ROWS, WIDTH)
        expected = self.values[tokens]
        for step in found:
            np.testing.assert_array_equal(step[:count], expected)
            assert (step[count:] == 1000).all()
            expected = expected[:, self.order]

    def threads_of_the_last_run(self) -> int:
        return int(team.threads_claimed(self.team._control))

    def all_parked(self) -> bool:
        words = [team.status_word(w) for w in range(1, self.team.workers + 1)]
        return all(self.team._control[word] == team.PARKED for word in words)


@contextmanager
def little(threads: int) -> Iterator[Little]:
    made = Little(threads)
    try:
        yield made
    finally:
        made.team.close()


def eventually(condition: Callable[[], bool], limit: float = 60) -> None:
    """Wait until something holds that nothing prevents; the limit only ends a broken test."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.002)


def workers_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edgert-")]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_thousand_programs_are_right(threads: int) -> None:
    with little(threads) as work:
        for round_ in range(1000):
            work.check(round_)


def test_more_threads_than_cores_finish() -> None:
    with little(12) as work:
        for round_ in range(60):
            work.check(round_)


def test_all_threads_take_part() -> None:
    with little(3) as work:

        def joined() -> bool:
            work.check(0)
            return work.threads_of_the_last_run() == 3

        eventually(joined)


@pytest.mark.parametrize("threads", [2, 4])
def test_workers_park_and_wake(threads: int) -> None:
    with little(threads) as work:
        for round_ in range(4):
            for n in range(20):
                work.check(round_ * 20 + n)
            eventually(work.all_parked)

            def joined() -> bool:
                work.check(3)
                return work.threads_of_the_last_run() == threads

            eventually(joined)


def test_programs_at_the_moment_of_parking_are_right() -> None:
    """Pauses around the time in which a worker gives up waiting."""
    with little(3) as work:
        for round_ in range(150):
            work.check(round_)
            time.sleep(round_ % 15 * 0.0005)


def test_close_ends_the_threads() -> None:
    before = workers_alive()
    work = Little(4)
    work.check(1)
    assert len(workers_alive()) == len(before) + 3
    work.team.close()
    assert workers_alive() == before
    work.team.close()  # once more does no harm


def test_closing_parked_workers_and_unused_teams() -> None:
    before = workers_alive()
    Little(3).team.close()
    with little(3) as work:
        work.check(1)
        eventually(work.all_parked)
    assert workers_alive() == before


def test_a_dropped_team_ends_its_threads() -> None:
    before = workers_alive()
    work = Little(3)
    work.check(1)
    gone = weakref.ref(work.team)
    del work
    gc.collect()
    assert gone() is None
    eventually(lambda: workers_alive() == before, limit=1)


def test_two_teams_side_by_side() -> None:
    with little(2) as one, little(3) as other:
        for round_ in range(100):
            one.check(round_)
            other.check(round_ + 1)


@pytest.mark.parametrize("moment", ["spinning", "parked"])
def test_a_team_left_open_does_not_keep_the_interpreter(moment: str) -> None:
    code = """
import time
from tests.test_team import Little, eventually
work = Little(3)
for round_ in range(20):
    work.check(round_)
if sys.argv[1] == "parked":
    eventually(work.all_parked)
print("end")
"""
    out, err = inputs.run_python(code, moment)
    assert out == "end\n"
    assert err == ""


def test_interrupts_between_and_around_programs_leave_the_team_usable() -> None:
    # In a process of its own: an interrupt inside the lock of a coverage tracer would leave that taken.
    code = """
import signal, time
from tests.test_team import little
armed = False
def interrupt(number, frame):
    if armed:
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
with little(3) as work:
    for round_ in range(60):
        # Again after a while: an interrupt inside a callback of the interpreter is swallowed.
        armed = True
        signal.setitimer(signal.ITIMER_REAL, 0.0005 + round_ % 10 * 0.0003, 0.2)
        try:
            while True:
                work.team.run()
                if round_ % 3 == 0:
                    time.sleep(0.012)  # so that the workers park, and some runs have to wake them
        except KeyboardInterrupt:
            armed = False
        work.check(round_)
    signal.setitimer(signal.ITIMER_REAL, 0)
print("end")
"""
    out, err = inputs.run_python(code)
    assert out == "end\n"
    assert err == ""


# An interrupt in a generator that is being closed is printed, not raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_step_of_waking_leaves_the_team_usable() -> None:
    """Ctrl-C at every instruction of the interpreter in turn, in every function that waking runs."""
    hit_at, steps = 0, 0

    def strike(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        if event in ("opcode", "return"):
            steps += 1
            if steps == hit_at:
                raise KeyboardInterrupt
        return strike

    before = sys.gettrace()
    with little(3) as work:
        work.check(0)
        while steps >= hit_at:
            eventually(work.all_parked)
            hit_at, steps = hit_at + 1, 0
            try:
                sys.settrace(strike)
                work.team.run()
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            work.check(hit_at)
        assert hit_at > 50  # the waking was really traced

        def joined() -> bool:
            work.check(0)
            return work.threads_of_the_last_run() == 3

        eventually(joined)
