"""What streaming experts from flash is worth: speed, hit rate and memory of a model larger than its budget.

    python tools/bench_experts.py all --text FILE -o FOLDER       # everything below, in at most 8 minutes

`all` records how the bundled model of 16 experts routes the last lines of a text, writes 4 GB of random
weights of OLMoE-1B-7B's shape, and times every case on them at budgets of 1 and 2 GiB, the trained model's
routing replayed (routing_replay.py); FOLDER/experts.json and FOLDER/experts.md are the result. What is in
FOLDER already is used again. `run` times cases on files made before:

    python tools/bench_experts.py run olmoe.ert --trace trace.npz --ram 2GiB --case streamed --repeats 3

Each case is a process of its own, the file's pages dropped from the cache before it. The cases are the
defaults; one part of it after the other switched off; loading on demand (one read at a time, no cache, no
prediction, no overlap); and the mapped file under a memory cgroup of the same size where this machine lets us
make one (as root). A case ends after --tokens or --seconds, whichever is first; the clock starts when the
slots are full and the governor has decided once, or after as many seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from routing_replay import Replay, record

import edgert
from edgert.experts import expert_parts, open_streamed
from edgert.flash import Streaming
from edgert.flash.reading import CANDIDATES, rate
from edgert.format import ErtFile
from edgert.format.layout import page_padded
from edgert.model.forward import Forward
from edgert.model.shapes import shape, write_random
from edgert.planner import parse_size, plan
from edgert.resident import peak_rss_bytes
from edgert.state import Weights

CONTEXT = 512
WARM = 48
"""Tokens before the clock starts: the cache fills, and the governor decides once (24)."""


@dataclass(frozen=True)
class Case:
    """One way to run the model, and what it shows."""

    streaming: Streaming
    says: str
    slots: int | None = None  # None: as many as fit
    mapped: bool = False


NAIVE = Streaming(predictor="none", overlap=False, readers=1)
CASES = {
    "streamed": Case(Streaming(), "the defaults"),
    "on demand": Case(NAIVE, "one read at a time, no cache, no prediction, no overlap", slots=0),
    "mapped": Case(
        Streaming(predictor="none"), "the page cache decides, under a cgroup of the budget", 0, True
    ),
    "no prediction": Case(Streaming(predictor="none"), "nothing is read ahead"),
    "prediction always": Case(Streaming(prefetch="on"), "read ahead whether it pays or not"),
    "history": Case(Streaming(predictor="history"), "predicted from the two layers before"),
    "no policy": Case(Streaming(), "no cache: room for one token's experts of one layer", slots=0),
    "frequency": Case(Streaming(policy="frequency"), "keeps what is used often"),
    "score": Case(Streaming(policy="score"), "keeps what routing weights (HybriMoE)"),
    "no overlap": Case(Streaming(overlap=False), "computes when all experts of a layer are there"),
    "one reader": Case(Streaming(readers=1), "one read in flight"),
}


def case(args: argparse.Namespace) -> None:
    """One measurement, in this process; prints one JSON object."""
    chosen = CASES[args.case]
    with ErtFile.open(args.model) as file:
        config = plan(
            *(file.spec, file.size),
            context=CONTEXT,
            threads=args.threads,
            ram=parse_size(args.ram),
            streamed=expert_parts(file.spec, file.tensors),
            chunk=8,
        )
        slots = config.slots if chosen.slots is None else file.spec.active_experts
        weights, store = open_streamed(file, slots, chosen.streaming)
        replay = Replay(weights, dict(np.load(args.trace)))
        if chosen.mapped:  # the program looks into the mapping, where every expert is
            store.arena = file.data
            store.ring.table[: store.ring.control] = Weights.of_file(file).expert_table().reshape(-1)
        forward = Forward(replay.weights, config, store)
        replay.attach(forward)
    drop_cache(args.model)
    _tokens(forward, replay, 0, WARM, args.seconds)
    before, began = store.totals(), time.perf_counter()
    tokens = _tokens(forward, replay, WARM, args.tokens, args.seconds)
    seconds = time.perf_counter() - began
    stats = store.report(before)
    forward.close()
    found = {"tok_s": tokens / seconds, "tokens": tokens, "seconds": seconds}
    print(json.dumps({**found, "peak_rss_bytes": peak_rss_bytes(), **stats, "piece": store.reading.piece}))


def _tokens(forward: Forward, replay: Replay, first: int, count: int, seconds: float) -> int:
    """Compute tokens first .. first + count - 1 of the trace, or those that the time allows; how many."""
    end = time.perf_counter() + seconds
    for done in range(count):
        if time.perf_counter() > end:
            return done
        replay.set(first + done)
        if forward.cache.length + 1 >= CONTEXT:
            forward.cache.rewind(0)
        forward.run([(first + done) % 1000 + 3])
    return count


def drop_cache(path: Path) -> None:
    """Let no page of the file be in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def curve(path: Path) -> dict[str, float]:
    """The flash by readers and piece, for experts of this file: bytes per second."""
    with ErtFile.open(path) as file:
        size = max(page_padded(t.nbytes) for t in file.tensors.values() if t.role == "expert")
    ways = sorted(CANDIDATES, key=lambda way: (way.piece, way.readers))
    found = {str(way): rate(path, size, way) for way in ways}
    for way, speed in found.items():
        print(f"{path.name}: experts of {size / 1e6:.2f} MB, {way}: {speed / 1e9:.2f} GB/s", flush=True)
    return found


def run(args: argparse.Namespace) -> None:
    """Every case at every budget, interleaved over the repeats; medians."""
    rows, flash = _measured(args)
    if args.out:
        args.out.write_text(json.dumps({"flash": flash, "cases": rows}, indent=1) + "\n", encoding="utf-8")
    print(_markdown(rows, flash))


def everything(args: argparse.Namespace) -> None:
    """The trace, the file, and all cases at 1 and 2 GiB."""
    began, folder = time.perf_counter(), args.out
    folder.mkdir(parents=True, exist_ok=True)
    moe, args.trace, args.model = folder / "moe.ert", folder / "trace.npz", folder / "olmoe.ert"
    if not moe.exists():
        edgert.convert(Path(edgert.__file__).parent / "assets" / "moe", moe, "q8")
    routing = record(moe, args.text, args.last, args.trace)
    if not args.model.exists():
        write_random(args.model, shape("olmoe-1b-7b"), "q4")
    args.ram, args.case = args.ram or ["1GiB", "2GiB"], None
    rows, flash = _measured(args)
    found = {"routing": routing, "file_bytes": args.model.stat().st_size, "flash": flash, "cases": rows}
    (folder / "experts.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = (
        f"{args.model.stat().st_size / 1e9:.2f} GB of random weights, OLMoE-1B-7B's shape, q4, "
        f"{args.threads} threads, cold page cache. Routing replayed from the bundled MoE on "
        f"{routing['tokens']} tokens: "
        f"{routing['again']:.0%} of the experts were chosen by the token before, {routing['predicted']:.0%} "
        f"of the predictions right.\n\n{_markdown(rows, flash)}"
    )
    (folder / "experts.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{time.perf_counter() - began:.0f} s in all; written to {folder}")


def _measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    flash = curve(args.model)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for ram in args.ram:
            for name in args.case or CASES:
                found = _in_a_process(args, name, ram)
                if found is not None:
                    way = f"{found['readers']} x {found['piece'] >> 20} MiB"
                    found["bandwidth"] = flash.get(way, max(flash.values()))
                    print(f"{ram} {name}: {found['tok_s']:.2f} tok/s", flush=True)
                    results.setdefault((ram, name), []).append(found)
    rows = []
    for (ram, name), runs in results.items():
        runs.sort(key=lambda r: float(r["tok_s"]))
        rows.append({"ram": ram, "case": name, **runs[len(runs) // 2]})
    return rows, flash


def _markdown(rows: list[dict[str, Any]], flash: dict[str, float]) -> str:
    lines = ["| readers x piece | " + " | ".join(flash) + " |", "|---" * (len(flash) + 1) + "|"]
    lines += ["| GB/s | " + " | ".join(f"{speed / 1e9:.2f}" for speed in flash.values()) + " |", ""]
    heads = ("budget", "case", "tok/s", "of on demand", "of mapped", "peak RSS MiB", "hits", "MB a token")
    heads += ("io_wait s", "bytes / bandwidth s", "of s", "guesses used", "prefetch", "readers")
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        speeds = {r["case"]: r["tok_s"] for r in rows if r["ram"] == row["ram"]}
        ratio = {
            name: f"{row['tok_s'] / speeds[name]:.2f}" if name in speeds else "not run"
            for name in ("on demand", "mapped")
        }
        asked = row["expert_hits"] + row["misses"]
        cells = [row["ram"], row["case"], f"{row['tok_s']:.2f}", ratio["on demand"], ratio["mapped"]]
        cells.append(f"{row['peak_rss_bytes'] / 2**20:.0f}")
        if CASES[row["case"]].mapped:
            cells += ["", "", "", "", f"{row['seconds']:.1f}", "", "", ""]
        else:
            cells += [
                f"{row['expert_hits'] / asked:.1%}",
                f"{row['bytes_read'] / row['tokens'] / 1e6:.0f}",
                f"{row['io_wait_s']:.2f}",
                f"{row['bytes_read'] / row['bandwidth']:.2f}",
                f"{row['seconds']:.1f}",
                f"{row['prefetch_useful']} of {row['prefetched']}",
                str(row["prefetch"]),
                f"{row['readers']} x {row['piece'] >> 20} MiB",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {case.says}" for name, case in CASES.items())]
    return "\n".join(lines) + "\n"


def _in_a_process(args: argparse.Namespace, name: str, ram: str) -> dict[str, Any] | None:
    command = [sys.executable, __file__, "case", str(args.model), "--trace", str(args.trace)]
    command += ["--case", name, "--ram", ram, "--tokens", str(args.tokens), "--threads", str(args.threads)]
    command += ["--seconds", str(args.seconds)]
    mapped = CASES[name].mapped
    group = _memory_group(parse_size(ram)) if mapped else None
    if mapped and group is None:
        print("mapped: this machine lets us make no memory cgroup; skipped", flush=True)
        return None

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter, check=False)
    if group is not None:
        group.rmdir()
    if done.returncode:
        print(f"{ram} {name}: {done.stderr.splitlines()[-1] if done.stderr else done.returncode}", flush=True)
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _memory_group(limit: int) -> Path | None:
    """A memory cgroup (version 2 or 1) of this size; None where none can be made."""
    for root, file in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        group = Path(root) / f"edgert-bench-{os.getpid()}"
        try:
            group.mkdir()
            if (group / file).is_file():  # else a plain folder: no cgroups are mounted there
                (group / file).write_text(str(limit))
                return group
            group.rmdir()
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def parse_args() -> argparse.Namespace:
    """The sub-command's arguments; `work` is its function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("all", everything), ("run", run), ("case", case)):
        sub = commands.add_parser(name)
        sub.set_defaults(work=work)
        sub.add_argument("--tokens", type=int, default=96)
        sub.add_argument("--seconds", type=float, default=6.0, help="most to warm up, and most to measure")
        sub.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        if work is everything:
            sub.add_argument("--text", type=Path, required=True, help="a story or a JSON object per line")
            sub.add_argument("--last", type=int, default=10, help="lines from the end of the text")
            sub.add_argument("--ram", action="append", help="[default: 1GiB and 2GiB]")
            sub.add_argument("--repeats", type=int, default=1)
            sub.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
            continue
        sub.add_argument("model", type=Path)
        sub.add_argument("--trace", type=Path, required=True)
        if work is run:
            sub.add_argument("--ram", action="append", required=True)
            sub.add_argument("--case", action="append", choices=CASES)
            sub.add_argument("--repeats", type=int, default=3)
            sub.add_argument("-o", "--out", type=Path)
        else:
            sub.add_argument("--ram", required=True)
            sub.add_argument("--case", choices=CASES, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    arguments.work(arguments)
