"""How fast segments come, and how much time the program leaves for reading ahead: running means."""

import time

_SMOOTH = 0.1
"""Of a new measurement: some tens of reads are remembered, less than a second of most devices."""


class Pace:
    """Fed with the beginnings and ends of reads; several may be in flight."""

    def __init__(self) -> None:
        self._running = 0
        self._began, self._bytes = 0.0, 0  # of the time since when any read is in flight
        self._byte_s = 0.0  # seconds of a byte, while any is read
        self._spare_s = 0.0  # between the end of what one request needed and the first read of the next
        self._needed_until = 0.0
        self._request = 0

    def begin(self) -> None:
        """A read begins."""
        if not self._running:
            self._began, self._bytes = time.perf_counter(), 0
        self._running += 1

    def end(self, size: int, needed: bool) -> None:
        """A read of so many bytes has ended. needed: by the newest request."""
        now = time.perf_counter()
        self._running -= 1
        self._bytes += size
        if needed:
            self._needed_until = now
        if not self._running and self._bytes:
            byte_s = (now - self._began) / self._bytes
            self._byte_s += (_SMOOTH if self._byte_s else 1) * (byte_s - self._byte_s)

    def needs(self, request: int) -> None:
        """The request with this number needs something read."""
        if request != self._request:
            self._request, now = request, time.perf_counter()
            if self._needed_until:
                self._spare_s += _SMOOTH * (max(0.0, now - self._needed_until) - self._spare_s)

    def room(self, size: int) -> int:
        """How many reads of so many bytes fit into what one request leaves free.

        At least one: that is what a trial of reading ahead measures.
        """
        read_s = self._byte_s * size
        return max(1, round(self._spare_s / read_s)) if read_s else 1
