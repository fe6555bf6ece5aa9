#!/usr/bin/env python3
"""A thousand generations over a link that fails: no hang, no crash, no wrong token, every fallback marked.

    python tools/soak_handoff.py [--count 1000] [--seed 0]

Each generation has its own prompt and one fault of a random kind at a random message, or a client whose
certificate is refused. Every token is compared with what its source, the cloud's layers or the exit, says
in one pass over the whole text. The model, the relay and the checks are those of tests/test_handoff_links.py.
"""

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # refused certificates are part of it

import edgert
from edgert.handoff.certs import write_certificates
from edgert.handoff.setup import HandoffConfig
from edgert.handoff.transport import Certificates
from tests.handoff_faults import FAULTS, Plan, Relay
from tests.handoff_models import random_tokens, serving, write_files
from tests.test_handoff import check_against_one_pass


def main() -> None:
    """Run them; a token that is wrong, or a mark that is missing, ends it with an assertion."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kinds = (*FAULTS, "certificate")
    done: collections.Counter[str] = collections.Counter()
    marks: collections.Counter[str] = collections.Counter()
    began, slowest = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        files = write_files(Path(scratch))
        for folder in ("ours", "theirs"):
            write_certificates(Path(scratch) / folder, ["localhost"], ["client"], 1)
        ours = Certificates.read(Path(scratch) / "ours", "server")
        with (
            serving(files.cloud) as cloud,
            serving(files.cloud, host="localhost", certificates=ours) as closed,
            Relay(cloud.address) as relay,
        ):

            def restart() -> None:
                cloud.stop()
                cloud.start()

            for number in range(options.count):
                fault = draw.choice(kinds)
                count = draw.randint(1, 12)
                prompt = random_tokens(("soak", options.seed, number), draw.randint(1, 30), 80)
                relay.plan = Plan(fault, draw.randint(0, 4 * count + 3), restart)  # type: ignore[arg-type]
                # Long enough to overcome what can be overcome; silence and strangers cannot.
                config: dict[str, Any] = {"cloud": relay.address, "deadline_s": 20.0}
                if fault == "silence":
                    config["deadline_s"] = 0.1
                if fault == "certificate":
                    config = {"cloud": closed.address, "tls": Path(scratch) / "theirs", "deadline_s": 0.1}
                started = time.monotonic()
                with edgert.load(files.edge, threads=1, chunk=8, handoff=HandoffConfig(**config)) as model:
                    stream = model.stream(prompt, max_tokens=count)
                    given = list(stream)
                    stopped = stream.completion().finish_reason == "stop"
                slowest = max(slowest, time.monotonic() - started)
                assert len(given) == count or stopped
                if given:
                    check_against_one_pass(files.whole, prompt, given)
                for event in given:
                    assert (event.source == "exit") == bool(event.fallback), (number, fault, event)
                    marks[event.fallback or "cloud"] += 1
                if fault not in ("silence", "certificate"):
                    assert not any(event.fallback for event in given), (number, fault)
                if fault == "certificate":
                    assert all(event.fallback for event in given)
                done[fault if fault == "certificate" or relay.plan.struck else "none struck"] += 1
                if (number + 1) % 50 == 0:
                    print(f"{number + 1} {dict(done)}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    print(f"{options.count} generations, {seconds:.0f} s, slowest {slowest:.1f} s: {dict(done)}")
    print(f"tokens by source: {dict(marks)}")


if __name__ == "__main__":
    main()
