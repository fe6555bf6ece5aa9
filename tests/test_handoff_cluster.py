"""Replicas of Ray Serve, started by the documented command, of which one is killed (extra `cluster`)."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import pytest

import edgert
from edgert.handoff.setup import HandoffConfig
from tests.conftest import Outcome
from tests.handoff_models import Files, random_tokens, replicas_of

pytest.importorskip("ray")


@pytest.mark.compiled
@pytest.mark.slow
def test_sessions_outlive_the_replica_that_held_them(handoff_files: Files) -> None:
    with edgert.load(handoff_files.whole, threads=1) as whole:
        tried = [random_tokens(("ray", n), 12, 80) for n in range(16)]
        texts = [(prompt, list(whole.generate(prompt, max_tokens=15).tokens)) for prompt in tried]
    prompts, expected = zip(*[(p, text) for p, text in texts if len(text) == 15][:8], strict=True)
    code = "from edgert.cli import main; main()"
    command = [sys.executable, "-c", code, "cloud", str(handoff_files.cloud), "--listen", "127.0.0.1:0"]
    command += ["-c", "64", "-t", "1", "--replicas", "2"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        ExitStack() as edges,
    ):
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert ", 2 replicas of 16 places of 64, " in line
            config = HandoffConfig(cloud=line.split(" at ")[1].split(",")[0], deadline_s=120)
            half = handoff_files.edge
            models = [edges.enter_context(edgert.load(half, threads=1, handoff=config)) for _ in prompts]
            streams = [m.stream(p, max_tokens=15) for m, p in zip(models, prompts, strict=True)]
            given = [[next(stream) for _ in range(5)] for stream in streams]
            os.kill(replicas_of(process.pid)[0], signal.SIGKILL)  # that holds about half of them
            for events, stream in zip(given, streams, strict=True):
                events.extend(stream)
            moved = sum(stream.completion().stats["reconnects"] > 0 for stream in streams)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            said = process.stderr.read()
        finally:
            process.kill()
    assert [[event.token for event in events] for events in given] == list(expected)
    assert {(event.source, event.fallback) for events in given for event in events} == {("cloud", "")}
    assert moved >= 1 and said == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ray imports
def test_more_cores_than_there_are_is_refused(handoff_files: Files, cli: Any) -> None:
    done: Outcome = cli("cloud", handoff_files.cloud, "--replicas", 999, "-t", 1)
    assert done.status == 1 and "999 replicas of 1 threads need 999 cores" in done.err
    assert done.err.count("\n") == 1
