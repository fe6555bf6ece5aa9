"""What it gives that a draft guesses on while the target waits for flash.

    python tools/bench_overlap.py TARGET.ert --draft DRAFT.ert --text STORIES.jsonl [--last 20] [--share 0.25]

The target has experts, with room for a share of them; the rest is read from the file, past the page cache.
Three engines continue the last texts of a file by turns, and must give the same tokens: plain decoding;
guessing; and guessing where nobody does anything while the target waits. `--bandwidth` holds reads back to a
slower flash, in MB/s (injected: a read sleeps until its bytes could have come). Prints one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Lock
from typing import Any

from edgert.bench_draft import generate
from edgert.config import SamplingParams
from edgert.engine import Engine
from edgert.evaluate import read_documents
from edgert.experts import open_streamed
from edgert.flash import FileSource, Streaming
from edgert.format import ErtFile
from edgert.planner import plan
from edgert.speculation import drafting
from edgert.speculation.controller import Controller, Steady
from edgert.speculation.decoder import Speculation
from edgert.speculation.drafter import Drafter
from edgert.speculation.tree import TokenTree
from edgert.tokenizer import Tokenizer


class SlowFile(FileSource):
    """A file on a flash of so many bytes per second, however many readers there are."""

    def __init__(self, path: Path, speed: float) -> None:
        super().__init__(path)
        self._speed, self._free, self._turn = speed, 0.0, Lock()

    def read(self, offset: int, into: memoryview) -> int:
        """See Source."""
        with self._turn:
            self._free = max(self._free, time.perf_counter()) + len(into) / self._speed
            due = self._free
        count = super().read(offset, into)
        time.sleep(max(0.0, due - time.perf_counter()))
        return count


class Still:
    """A drafter that does nothing while the target waits."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def extend(self, tree: TokenTree) -> bool:
        """There is nothing to do."""
        return False


def open_engine(args: argparse.Namespace, guesses: str) -> Engine:
    """An engine whose experts are streamed. guesses: "none", "on" or "still"."""
    with ErtFile.open(args.target) as file:
        spec = file.spec
        experts = sum(t.role == "expert" for t in file.tensors.values())
        slots = max(2 * spec.active_experts, round(args.share * experts))
        source = SlowFile(args.target, args.bandwidth * 1e6) if args.bandwidth else None
        weights, store = open_streamed(file, slots, Streaming(), source)
        config = plan(spec, file.size, threads=args.threads, context=args.prompt + args.count + 80)
        decoder = None
        if guesses != "none":
            made = drafting(file, str(args.draft), tree=args.tree, threads=args.threads)
            decoder = made.decoder(spec, args.always)
            if guesses == "still":
                kind = Steady if args.always else Controller
                drafters: Sequence[Any] = [Still(d) for d in decoder._drafters.values()]
                decoder = Speculation(drafters, kind(made.names, made.tree))
    return Engine(weights, config, decoder, store)


def main() -> None:
    """Run and print."""
    args = arguments()
    with ErtFile.open(args.target) as file:
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
    prompts = [tokenizer.encode(text)[: args.prompt] for text in read_documents(args.text, args.last)]
    params = SamplingParams(max_tokens=args.count, temperature=0.0)
    seconds: dict[str, list[float]] = {"none": [], "still": [], "on": []}
    found: dict[str, dict[str, float]] = {name: {} for name in seconds}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(closing(open_engine(args, name))) for name in seconds}
        for turn, prompt in enumerate([prompts[0], *prompts]):
            names = list(seconds)
            told = set()
            for name in names[turn % 3 :] + names[: turn % 3]:
                engine = engines[name]
                waits, used = engine.forward.waits.waited_s, engine.forward.waits.used_s
                engine.sequence.clear()
                tokens, took = generate(engine, prompt, params)
                told.add(tokens)
                if turn == 0:  # the kernels, the slots and the controller get warm
                    continue
                seconds[name].append(took / (len(tokens) - 1))
                stats = engine.report() | {
                    "waited_s": engine.forward.waits.waited_s - waits,
                    "used_s": engine.forward.waits.used_s - used,
                }
                for key in ("verifications", "fallback_steps", "drafted", "draft_s", "waited_s", "used_s"):
                    found[name][key] = round(found[name].get(key, 0) + stats.get(key, 0), 4)
            assert len(told) == 1, f"the engines differ after prompt {turn}"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = {
        name: {
            "ms_per_token": round(1e3 * medians[name], 3),
            "speedup": round(medians["none"] / medians[name], 3),
            **found[name],
        }
        for name in seconds
    }
    still_over_on = statistics.median(a / b for a, b in zip(seconds["still"], seconds["on"], strict=True))
    print(json.dumps({"prompts": len(prompts), **rows, "still_over_on": round(still_over_on, 3)}, indent=1))


def arguments() -> argparse.Namespace:
    """What is on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--last", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.25, help="of the experts, that have room")
    parser.add_argument("--bandwidth", type=float, help="of the injected flash, in MB/s")
    parser.add_argument("--always", action="store_true", help="guess at every step, whether it pays or not")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-n", "--count", type=int, default=96, help="tokens after each prompt")
    parser.add_argument("-p", "--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--tree", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
