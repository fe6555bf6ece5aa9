#!/usr/bin/env python3
"""Many edges on one cloud half: throughput against one by one, tokens against solo runs, memory.

    python tools/load_handoff.py WHOLE.ert --text STORIES.jsonl --clients 64

The edges' part is computed beforehand: each client replays the hidden rows of a text that the whole model
wrote, asks after every row, and compares the answer with the token of the solo run. So the figures are the
cloud half's, and those of the wire; clients and server share this machine.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgert
from edgert.config import EngineConfig, SamplingParams
from edgert.converters import split
from edgert.evaluate import read_documents
from edgert.format import ErtFile
from edgert.format.identity import identity
from edgert.handoff.link import Link, LinkConfig
from edgert.handoff.transport import Address
from edgert.handoff.upper import Failure
from edgert.model.forward import Forward
from edgert.planner import buffer_bytes, cache_bytes
from edgert.sampling import Sampler
from edgert.state import Weights


@dataclass
class Client:
    """What one edge says, and what it has to hear."""

    tokens: list[int]
    prompt: int
    hidden: NDArray[np.float32]  # [T, D]
    wrong: int = 0
    seconds: float = 0.0


def main() -> None:
    """Run one by one, then all at once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("-n", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1, help="of the cloud half")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ErtFile.open(options.file) as file:
        layer = file.spec.exits[-1] if file.spec.exits else file.spec.layers // 2
        half, context = Path(scratch) / "cloud.ert", options.prompt + options.n
        split(options.file, layer, Path(scratch) / "edge.ert", half)
        clients = prepare(file, options, layer)
        config = EngineConfig(options.threads, context, 256, sequences=options.clients)
        with ErtFile.open(half) as opened:
            promised = cache_bytes(opened.spec, config) + buffer_bytes(opened.spec, config) + opened.size
        with cloud_process(half, options, context) as (address, pid):
            make = lambda: Link(  # noqa: E731
                LinkConfig(Address.parse(address), deadline_s=600),
                identity(file),
                layer,
                file.spec.width,
                file.spec.vocab,
            )
            replay(make(), clients[0])  # compiles and warms up
            before, alone = resident(pid), one_by_one(make, clients)
            together = at_once(make, clients)
            after = resident(pid)
    tokens = sum(len(c.tokens) - c.prompt for c in clients)
    waits = sorted(c.seconds / (len(c.tokens) - c.prompt) * 1000 for c in clients)
    print(f"{options.clients} clients, {tokens} tokens, {sum(c.wrong for c in clients)} other than solo")
    rates = f"one by one {tokens / alone:.0f} tokens/s, at once {tokens / together:.0f} tokens/s"
    print(f"{rates} ({alone / together:.2f}x)")
    print(f"ms per token at once: median {waits[len(waits) // 2]:.1f}, slowest client {waits[-1]:.1f}")
    grown, limit = (after - before) / 2**20, promised / 2**20
    memory = f"resident {before / 2**20:.0f} MiB before, {grown:+.1f} MiB after"
    print(f"{memory}; cache, buffers and weights promise {limit:.1f} MiB")


def prepare(file: ErtFile, options: argparse.Namespace, layer: int) -> list[Client]:
    """The texts as the whole model goes on with them, and their rows below `layer`."""
    clients = []
    texts = read_documents(options.text, options.clients)
    with edgert.load(options.file, threads=1) as model:
        for text in texts:
            prompt = model.tokenizer.encode(text)[: options.prompt]
            written = model.generate(prompt, max_tokens=options.n).tokens
            clients.append(Client([*prompt, *written], len(prompt), np.empty(0, np.float32)))
    forward = Forward(Weights.of_file(file), EngineConfig(1, options.prompt + options.n, 256))
    for client in clients:
        forward.cache.rewind(0)
        client.hidden = forward.run(client.tokens, layers=(0, layer)).copy()
    forward.close()
    return [client for client in clients if len(client.tokens) > client.prompt]


def replay(link: Link, client: Client) -> None:
    """One text from its prompt to its end."""
    began = time.perf_counter()
    try:
        link.begin(0, Sampler(SamplingParams(seed=0), 1 << 30), client.prompt)
        first = 0
        for count in range(client.prompt, len(client.tokens)):
            link.push(first, client.tokens[first:count], client.hidden[first:count])
            first = count
            found = link.ask(count)
            client.wrong += isinstance(found, Failure) or found[0].token != client.tokens[count]
    finally:
        link.close()
    client.seconds = time.perf_counter() - began


def one_by_one(make: Callable[[], Link], clients: list[Client]) -> float:
    """Seconds for all clients, one after another."""
    began = time.perf_counter()
    for client in clients:
        replay(make(), client)
    return time.perf_counter() - began


def at_once(make: Callable[[], Link], clients: list[Client]) -> float:
    """Seconds for all clients at the same time."""
    threads = [threading.Thread(target=replay, args=(make(), client)) for client in clients]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


@contextmanager
def cloud_process(file: Path, options: argparse.Namespace, context: int) -> Iterator[tuple[str, int]]:
    """`edgert cloud` with a place for each client; its address and process id."""
    places = ("--places", str(options.clients), "--per-client", str(options.clients), "-c", str(context))
    command = [sys.executable, "-m", "edgert", "cloud", str(file), "--listen", "127.0.0.1:0", *places]
    with subprocess.Popen(
        [*command, "-t", str(options.threads)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" at ")[1].split(",")[0], process.pid
        finally:
            process.terminate()


def resident(pid: int) -> int:
    """Resident memory of a process, in bytes (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
