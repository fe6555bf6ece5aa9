#!/usr/bin/env python3
"""Many edges on one cloud half: throughput against one by one, tokens against solo runs, memory.

    python tools/load_handoff.py WHOLE.ert --text STORIES.jsonl --clients 64

The edges' part is computed beforehand: each client replays the hidden rows of a text that the whole model
wrote, asks after every row, and compares the answer with the token of the solo run. So the figures are the
cloud half's, and those of the wire; clients and server share this machine. Then once more all at once, beside
clients who send messages that are too large or that are none: these are refused and counted, the others get
their tokens.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
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
from edgert.handoff.wire import METHOD
from edgert.model.forward import Forward
from edgert.planner import buffer_bytes, cache_bytes
from edgert.sampling import Sampler
from edgert.state import Weights

sys.path.append(str(Path(__file__).resolve().parent))
from handoff.cloud import cloud_process

HOSTILE = 4  # clients that send what is no message


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
        config = EngineConfig(options.threads, context, 256, sequences=options.clients + HOSTILE)
        with ErtFile.open(half) as opened:
            promised = cache_bytes(opened.spec, config) + buffer_bytes(opened.spec, config) + opened.size
        places = str(options.clients + HOSTILE)
        limits = ("--places", places, "--per-client", places, "-c", str(context))
        with cloud_process(half, "-t", str(options.threads), *limits) as cloud:
            make = lambda: Link(  # noqa: E731
                LinkConfig(Address.parse(cloud.address), deadline_s=600),
                identity(file),
                layer,
                file.spec.width,
                file.spec.vocab,
            )
            replay(make(), clients[0])  # compiles and warms up
            before, alone = cloud.resident(), one_by_one(make, clients)
            together = at_once(make, clients)
            after, wrong = cloud.resident(), sum(c.wrong for c in clients)
            with hostile(cloud.address) as sent:
                at_once(make, clients)
            refused, last = cloud.counted("edgert_refusals_total"), cloud.resident()
    tokens = sum(len(c.tokens) - c.prompt for c in clients)
    waits = sorted(c.seconds / (len(c.tokens) - c.prompt) * 1000 for c in clients)
    print(f"{options.clients} clients, {tokens} tokens, {wrong} other than solo")
    rates = f"one by one {tokens / alone:.0f} tokens/s, at once {tokens / together:.0f} tokens/s"
    print(f"{rates} ({alone / together:.2f}x)")
    print(f"ms per token at once: median {waits[len(waits) // 2]:.1f}, slowest client {waits[-1]:.1f}")
    grown, limit = (after - before) / 2**20, promised / 2**20
    memory = f"resident {before / 2**20:.0f} MiB before, {grown:+.1f} MiB after"
    print(f"{memory}; cache, buffers and weights promise {limit:.1f} MiB")
    wrong = sum(c.wrong for c in clients) - wrong
    print(
        f"beside {sum(sent)} streams of messages too large or malformed: {refused:.0f} refused and counted, "
        f"{wrong} tokens other than solo, {(last - after) / 2**20:+.1f} MiB"
    )


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
def hostile(address: str) -> Iterator[list[int]]:
    """Meanwhile, clients whose messages are broken; gives how many of their streams were ended."""
    count, over = [0] * HOSTILE, threading.Event()

    def send(number: int) -> None:
        data = os.urandom((4 << 20) + 1) if number % 2 else b"\xff" * 64
        while not over.is_set():
            with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
                list(channel.stream_stream(METHOD)(iter([data])))
            count[number] += 1

    threads = [threading.Thread(target=send, args=(number,)) for number in range(HOSTILE)]
    for thread in threads:
        thread.start()
    try:
        yield count
    finally:
        over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
