"""Whether reading ahead pays: measured on this machine, on this text, again and again.

A read that turns out useless delays the one that is needed. How often that happens, and what it costs,
depends on model, memory, device and text, and published measurements disagree; so the time of a token
with prefetching and without is measured in turns, and the faster way kept for a while.
"""

from statistics import median

TURN = 6
"""Forwards of one way before the other is tried: the first after a change still has the other's reads."""
TURNS = 4
"""Turns of one trial: off, on, off, on, so that a drift does not favour one."""
HOLD = 200
"""Forwards for which a decision holds: the trial is 24, so its losing half costs 6 % of the time at most."""


class Governor:
    """Decides from the seconds of single-row forwards. Give it each with `note`."""

    def __init__(self, automatic: bool) -> None:
        self._automatic = automatic
        self.on = not automatic
        self._times: dict[bool, list[float]] = {False: [], True: []}
        self._done = 0  # forwards of this trial
        self._held = 0  # forwards left of this decision
        self.gain: float | None = None  # of the last trial: time saved by prefetching over time without

    def note(self, seconds: float) -> None:
        """One forward of one row took this long."""
        if not self._automatic:
            return
        if self._held:
            self._held -= 1
            return
        if self._done % TURN:
            self._times[self.on].append(seconds)
        self._done += 1
        if self._done < TURN * TURNS:
            self.on = self._done // TURN % 2 == 1
            return
        off, on = median(self._times[False]), median(self._times[True])
        self.gain = 1 - on / off if off > 0 else 0.0
        self.on = self.gain > 0
        self._times = {False: [], True: []}
        self._done, self._held = 0, HOLD

    def report(self) -> str:
        """One line for people: on, off, or undecided, and what the last trial found."""
        if not self._automatic:
            return "on"
        if self.gain is None:
            return "undecided"
        return f"{'on' if self.gain > 0 else 'off'}, it takes {-100 * self.gain:+.0f}% of the time"
