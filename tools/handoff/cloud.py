"""`edgert cloud` as a process of its own, for benchmarks: where it serves, and what it counted."""

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cloud:
    """A running one."""

    address: str
    metrics: str
    pid: int

    def counted(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def seconds(self) -> float:
        """How long its forwards took so far, in all."""
        return self.counted("edgert_forward_seconds_sum")

    def resident(self) -> int:
        """Resident memory, in bytes (Linux)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0


@contextmanager
def cloud_process(file: Path, *options: str) -> Iterator[Cloud]:
    """`edgert cloud FILE` on free ports of loopback, with one thread unless the options say otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "edgert", "cloud", str(file), "--listen", "127.0.0.1:0"]
    command += ["--metrics", metrics, "-t", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Cloud(process.stdout.readline().split(" at ")[1].split(",")[0], metrics, process.pid)
        finally:
            process.terminate()
