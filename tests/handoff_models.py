"""A small model with exits, whole and cut in two, and servers for it that tests start and stop."""

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgert.config import EngineConfig
from edgert.converters import split
from edgert.converters.exits import fingerprint
from edgert.converters.safetensors_source import open_shard
from edgert.format import ErtFile
from edgert.format.rewrite import rewrite
from edgert.handoff.calibration import as_metadata, calibrate
from edgert.handoff.sessions import Limits
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import tiny_models

LAYER = 2  # of 3: where the model is cut
EXITS = (1, 2)
COUNTS = {"temperature": 1.0, "confidence": [0.0], "tokens": [1], "agreed": [1]}


@dataclass(frozen=True)
class Files:
    """One model: whole, and its two halves."""

    whole: Path
    edge: Path
    cloud: Path
    small: Path  # another model with the same tokenizer: the same weights, rounded more


def write_files(folder: Path, quant: Any = "q8") -> Files:
    """Random weights; the last layers do little, so that exits often agree with the whole."""
    from safetensors.numpy import load_file, save_file

    import edgert

    source = folder / "source"
    tiny_models.write_folder(source, "llama_mqa_odd_sizes")
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    for name in tensors:
        if name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensors[name] * np.asarray(0.3, tensors[name].dtype)
    save_file(tensors, shard, {"format": "pt"})
    norm = open_shard(shard)["model.norm.weight"]
    width = tensors["model.norm.weight"].size
    heads: dict[str, Any] = {}
    for layer in EXITS:
        heads[f"exits.{layer}.norm"] = np.ones(width, np.float32)
        heads[f"exits.{layer}.matrix"] = np.zeros((width, width), np.float32)  # a logit lens
        heads[f"exits.{layer}.output_norm"] = tensors["model.norm.weight"].astype(np.float32)
    counts = json.dumps({str(layer): COUNTS for layer in EXITS})
    save_file(heads, source / "exits.safetensors", {"model": fingerprint(norm), "exits": counts})
    files = Files(*(folder / f"{name}.ert" for name in ("whole", "edge", "cloud", "small")))
    edgert.convert(source, files.whole, quant)
    edgert.convert(source, files.small, "q4")
    with ErtFile.open(files.whole) as file:
        forward = Forward(Weights.of_file(file), EngineConfig(1, file.spec.context, 64))
        try:
            texts = [random_tokens(("calibrate", n), 60, file.spec.vocab) for n in range(4)]
            found = calibrate(forward, dict.fromkeys(EXITS, 0.5), texts)
        finally:
            forward.close()
        rewrite(file, files.whole, as_metadata(found))
    split(files.whole, LAYER, files.edge, files.cloud)
    return files


def random_tokens(label: object, count: int, vocab: int) -> list[int]:
    return [int(t) for t in inputs.whole((label, "tokens"), 3, vocab - 1, count)]


class Server:
    """A cloud half in a thread with an event loop of its own, which can be stopped and started."""

    def __init__(
        self,
        path: Path,
        *,
        port: int = 0,
        sequences: int = 4,
        context: int = 64,
        chunk: int = 64,
        limits: Limits | None = None,
        certificates: Any = None,
        host: str = "127.0.0.1",
        gateway_key: str = "",
    ) -> None:
        from edgert.handoff.metrics import Metrics

        self.path, self.port, self.host = path, port, host
        self.config = EngineConfig(1, context, chunk, sequences=sequences)
        self.limits, self.certificates = limits or Limits(), certificates
        self.gateway_key = gateway_key
        self.metrics = Metrics()
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(60)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """At once, as a crash would: open streams break."""
        if self._thread is None:
            return
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._thread = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def _run(self, ready: threading.Event) -> None:
        from edgert.handoff.server import ServerConfig, serve
        from edgert.handoff.transport import Address

        def told(port: int) -> None:
            self.port = port
            ready.set()

        async def main() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            address = Address(self.host, self.port)
            config = ServerConfig(address, self.certificates, self.limits, gateway_key=self.gateway_key)
            with ErtFile.open(self.path) as file:
                forward = Forward(Weights.of_file(file), self.config)
                try:
                    await serve(file, forward, config, told, self.metrics)
                finally:
                    forward.close()

        try:
            asyncio.run(main())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.error = error
        ready.set()


@contextmanager
def serving(path: Path, **options: Any) -> Iterator[Server]:
    server = Server(path, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def count(server: Server, name: str, **labels: str) -> float:
    """The value of a metric."""
    return server.metrics.registry.get_sample_value(name, labels or None) or 0.0


def replicas_of(process: int) -> list[int]:
    """Process ids of the Ray Serve replicas below a command's process, by their names."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True)
    found = [line.split(None, 2) for line in listing.stdout.splitlines()[1:]]
    family = {process}
    for _ in range(3):  # the command, the raylet, its workers
        family |= {int(pid) for pid, parent, _ in found if int(parent) in family}
    return [int(pid) for pid, _, name in found if int(pid) in family and "ServeReplica:edgert" in name]
