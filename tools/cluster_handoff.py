#!/usr/bin/env python3
"""Edges served by two replicas of Ray Serve, of which one is killed: whose tokens are right, who waited.

    python tools/cluster_handoff.py WHOLE.ert --text HELD_OUT.jsonl [--edges 8]

WHOLE.ert has exits; it is split at the last. Each edge hands every token over, and a third of the way one
replica gets SIGKILL. Needs the extra `cluster`.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import edgert
from edgert.converters import split
from edgert.evaluate import read_documents
from edgert.format import ErtFile
from edgert.handoff.setup import HandoffConfig

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests.handoff_models import replicas_of


def main() -> None:
    """Run it once; print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--edges", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("-n", type=int, default=60)
    options = parser.parse_args()
    with edgert.load(options.file, threads=1) as model:
        texts = read_documents(options.text, options.edges)
        prompts = [model.tokenizer.encode(text)[: options.prompt] for text in texts]
        expected = [list(model.generate(prompt, max_tokens=options.n).tokens) for prompt in prompts]
    with tempfile.TemporaryDirectory() as scratch:
        edge, cloud = Path(scratch) / "edge.ert", Path(scratch) / "cloud.ert"
        with ErtFile.open(options.file) as file:
            split(options.file, file.spec.exits[-1], edge, cloud)
        command = [sys.executable, "-m", "edgert", "cloud", str(cloud), "--listen", "127.0.0.1:0", "-t", "1"]
        command += ["--replicas", str(options.replicas)]
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                print(f"{' '.join(command[1:4])} ... serves after {time.monotonic() - began:.0f} s")
                address = line.split(" at ")[1].split(",")[0]
                run(edge, address, prompts, expected, process.pid, options)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def run(
    edge: Path,
    address: str,
    prompts: list[list[int]],
    expected: list[list[int]],
    command: int,
    options: argparse.Namespace,
) -> None:
    """All edges at once, and the killing between."""
    third = threading.Barrier(len(prompts) + 1)

    def generate(prompt: list[int]) -> tuple[list[Any], list[float], dict[str, Any]]:
        config = HandoffConfig(cloud=address, deadline_s=120)
        given, waits = [], []
        with edgert.load(edge, threads=1, handoff=config) as model:
            stream = model.stream(prompt, max_tokens=options.n)
            while True:
                if len(given) == options.n // 3:
                    third.wait()  # all have come so far
                    third.wait()  # one replica is gone
                asked = time.monotonic()
                event = next(stream, None)
                if event is None:
                    return given, waits, stream.completion().stats
                waits.append(time.monotonic() - asked)
                given.append(event)

    with ThreadPoolExecutor(len(prompts)) as pool:
        running = [pool.submit(generate, prompt) for prompt in prompts]
        third.wait()
        victim, *_ = replicas_of(command)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        third.wait()
        done = [future.result() for future in running]
    wrong = sum(
        event.token != token
        for (given, _, _), right in zip(done, expected, strict=True)
        for event, token in zip(given, right, strict=True)
    )
    moved = [waits for _, waits, stats in done if stats["reconnects"]]
    stayed = [waits for _, waits, stats in done if not stats["reconnects"]]
    tokens = sum(len(given) for given, _, _ in done)
    fallbacks = sum(stats["fallbacks"] for _, _, stats in done)
    print(f"{len(done)} edges, {tokens} tokens, {wrong} wrong, {fallbacks} without an answer")
    for name, group in (("moved to another replica", moved), ("stayed", stayed)):
        if group:
            slowest = max(max(waits[options.n // 3 :]) for waits in group)
            usual = statistics.median(wait for waits in group for wait in waits)
            print(f"{len(group)} {name}: slowest token {slowest:.2f} s, median {usual * 1000:.0f} ms")
    while len(replicas_of(command)) < options.replicas:
        time.sleep(0.2)
    print(f"{options.replicas} replicas again {time.monotonic() - killed:.0f} s after the kill (process)")


if __name__ == "__main__":
    main()
