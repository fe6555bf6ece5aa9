"""What the cloud half counts, for Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from edgert.errors import LinkError


class Metrics:
    """Counters of one cloud half, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sessions = Gauge("edgert_sessions", "Sessions that hold a place.", registry=registry)
        self.waiting = Gauge("edgert_waiting_bytes", "Hidden rows that wait.", registry=registry)
        self.open = Gauge("edgert_open_questions", "Questions that wait.", registry=registry)
        self.rows = Counter("edgert_rows", "Rows received.", registry=registry)
        self.questions = Counter("edgert_questions", "Questions asked.", registry=registry)
        self.answers = Counter("edgert_answers", "Tokens given.", registry=registry)
        self.resends = Counter("edgert_resends", "Times an edge was asked to send again.", registry=registry)
        self.evictions = Counter("edgert_evictions", "Sessions that lost their place.", registry=registry)
        self.refusals = Counter("edgert_refusals", "Streams refused.", ["reason"], registry=registry)
        self.received = Counter("edgert_received_bytes", "Messages of edges.", registry=registry)
        self.sent = Counter("edgert_sent_bytes", "Messages to edges.", registry=registry)
        self.layer_tokens = Counter(
            "edgert_layer_tokens", "Layers computed, summed over rows.", registry=registry
        )
        self._evicted = 0
        self._rows_per_forward = Histogram(
            "edgert_forward_rows",
            "Rows side by side in a forward.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            registry=registry,
        )
        self._forward_seconds = Histogram("edgert_forward_seconds", "Time of a forward.", registry=registry)

    def count_evictions(self, total: int) -> None:
        """So many sessions lost their places since the start."""
        self.evictions.inc(total - self._evicted)
        self._evicted = total

    @contextmanager
    def forward(self, rows: int) -> Iterator[None]:
        """Times one forward of so many rows."""
        began = time.perf_counter()
        yield
        self._forward_seconds.observe(time.perf_counter() - began)
        self._rows_per_forward.observe(rows)

    def serve(self, host: str, port: int) -> None:
        """Answer Prometheus at http://HOST:PORT/metrics, from a thread of its own; or raise LinkError."""
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise LinkError(f"metrics cannot be served on {host}:{port} ({error.strerror})") from None
