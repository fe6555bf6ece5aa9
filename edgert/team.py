"""The Python side of the thread team: starting, waking and ending the workers of one run."""

import contextlib
import threading
import time
import weakref
from typing import Any

import numpy as np

from edgert.kernels import execute, team
from edgert.kernels.jit import JIT
from edgert.kernels.operations import Run, pack

_WAKE_WAIT = 0.002
"""Seconds the leader waits for a worker it woke. One that is later joins the next program."""


class _Bell:
    """What one worker sleeps on.

    A bare lock, not a Semaphore or an Event of `threading`: those are Python code around a lock, and a
    Ctrl-C that strikes between their taking it and their `with` leaves it taken for ever. The two calls
    on a bare lock are each one step that no signal divides.
    """

    def __init__(self) -> None:
        self._quiet = threading.Lock()
        self._quiet.acquire()
        self.closing = False

    def ring(self) -> None:
        """Wake the worker, or let its next wait pass."""
        # Only a ring that nobody heard yet leaves it open, and then there is nothing to do.
        with contextlib.suppress(RuntimeError):
            self._quiet.release()

    def wait(self) -> None:
        """Sleep until rung."""
        self._quiet.acquire()


class Team:
    """Threads that execute programs over one fixed set of arrays. Close it, or leave it to the collector.

    With the JIT off the caller's thread works alone.
    """

    def __init__(self, threads: int, run: Run) -> None:
        self.workers = threads - 1 if JIT else 0
        self.seconds = 0.0  # spent in compiled code, all runs together
        self._control = np.zeros(team.control_words(self.workers), np.int64)
        # Kept: compiled code has the addresses of its arrays only.
        self._run = run._replace(tickets=np.zeros(len(run.code), np.int64))
        self._arguments = (pack(self._run), self._control)
        self._bells = [_Bell() for _ in range(self.workers)]
        weakref.finalize(self, _dismiss, self._bells)
        # Started here, parked, and not at the first run: an interrupt among the starts then leaves no
        # team at all instead of one that lacks a worker.
        self._threads = [self._start(worker) for worker in range(1, self.workers + 1)]

    def run(self) -> None:
        """Execute the job that the job array describes, with all workers that are there."""
        if self.workers:
            self._rouse()
        began = time.perf_counter()
        execute.enter(0, self.workers, *self._arguments)
        self.seconds += time.perf_counter() - began

    def close(self) -> None:
        """End the workers; the team is not used again."""
        _dismiss(self._bells)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _start(self, worker: int) -> threading.Thread:
        arguments = (worker, self.workers, self._arguments, self._run, self._bells[worker - 1])
        thread = threading.Thread(target=_serve, args=arguments, daemon=True, name=f"edgert-{worker}")
        thread.start()
        return thread

    def _rouse(self) -> None:
        woken = [w for w in range(1, self.workers + 1) if self._asleep(w)]
        for worker in woken:
            self._bells[worker - 1].ring()
        deadline = time.monotonic() + _WAKE_WAIT
        while any(self._control[team.status_word(w)] == team.WAKING for w in woken):
            if time.monotonic() > deadline:
                break
            time.sleep(0)

    def _asleep(self, worker: int) -> bool:
        """Whether to ring for it. One marked WAKING before is waiting for a ring that an interrupt
        prevented, or merely slow; one ring too many only lets it look for work once more."""
        return bool(team.wake(self._control, worker)) or (
            self._control[team.status_word(worker)] == team.WAKING
        )


def _dismiss(bells: list[_Bell]) -> None:
    """Let the workers end: they look at `closing` when they are rung."""
    for bell in bells:
        bell.closing = True
        bell.ring()


def _serve(worker: int, workers: int, arguments: tuple[Any, ...], run: Run, bell: _Bell) -> None:
    # A function, not a method: a thread that held the Team would keep it alive. It does hold the run.
    while True:
        bell.wait()
        if bell.closing:
            return
        execute.enter(worker, workers, *arguments)
