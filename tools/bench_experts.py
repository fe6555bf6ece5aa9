"""What streaming experts from flash is worth: speed, hit rate and memory of a model larger than its budget.

    python tools/bench_experts.py record MODEL.ert --text FILE -o trace.npz   # a trained model's routing
    python tools/bench_experts.py make -o olmoe.ert [--shape olmoe-1b-7b]     # 4 GB of random weights
    python tools/bench_experts.py run olmoe.ert --trace trace.npz --ram 1GiB --ram 2GiB -o experts.json

`run` times each case in a process of its own, the file's pages dropped from the cache before it: the
defaults, each part switched off in turn, loading on demand (no cache, no prediction, no overlap), and the
mapped file under a memory cgroup of the same size where this machine lets us make one (as root).

Random weights route at random, which no trained model does. So `run` replays a trace: the routers become
zero, and before each token their bias is set to logits that choose what the trace says; the predictions
(the next layer's router on this layer's input) are replayed likewise, right or wrong as they were. A trace
of fewer layers and experts is widened: layers and tokens are taken in turn, and each expert stands for as
many of ours as make the number up, so that shares of reuse and of right guesses stay those measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.experts import Streaming, open_streamed
from edgert.format import ErtFile, StoredTensor
from edgert.format.layout import page_padded
from edgert.kernels import experts as words
from edgert.kernels import program
from edgert.model.forward import Forward
from edgert.model.shapes import shape, write_random
from edgert.planner import parse_size, plan
from edgert.resident import peak_rss_bytes
from edgert.state import Weights
from edgert.tokenizer import Tokenizer

CONTEXT = 512
WARM = 64
"""Tokens before the clock starts: the cache fills, and the governor decides once."""
CASES: dict[str, Streaming | None] = {
    "streamed": Streaming(),
    "prefetch always": Streaming(prefetch="on"),
    "history instead of router": Streaming(predictor="history"),
    "no prediction": Streaming(predictor="none"),
    "no overlap": Streaming(overlap=False),
    "frequency": Streaming(policy="frequency"),
    "score": Streaming(policy="score"),
    "on demand": Streaming(predictor="none", overlap=False),  # with the fewest slots: no cache
    "mapped": None,  # the page cache decides, under a memory limit
}


def record(args: argparse.Namespace) -> None:
    """The experts chosen, and those predicted, of every token and layer of a text."""
    with ErtFile.open(args.model) as file:
        config = plan(file.spec, file.size, context=file.spec.context, threads=1)
        count = sum(t.role == "expert" for t in file.tensors.values())
        weights, store = open_streamed(file, count, Streaming(prefetch="on"))
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        spec, forward = file.spec, Forward(weights, config, store)
    chosen: list[list[list[int]]] = []
    ahead: list[list[list[int]]] = []
    try:
        for text in args.text.read_text("utf-8").splitlines()[-args.last :]:
            forward.cache.rewind(0)
            body = json.loads(text)["text"] if text.startswith("{") else text
            for token in tokenizer.encode(body)[: spec.context - 1]:
                forward.run([token])
                newest = int(words.newest_request(store.table, store.control))
                found = [store.request(newest - i) for i in reversed(range(spec.layers))]
                by_weight = [r.experts for r in found]
                chosen.append(by_weight)
                ahead.append([[], *([list(r.ahead) for r in found[:-1]])])
    finally:
        forward.close()
    k = spec.active_experts
    picks = np.array(chosen, np.int16)
    guesses = np.array([[g if len(g) == k else [-1] * k for g in row] for row in ahead], np.int16)
    right = (guesses[:, 1:, :, None] == picks[:, 1:, None, :]).any(-1).mean()
    again = (picks[1:, :, :, None] == picks[:-1, :, None, :]).any(-1).mean()
    np.savez_compressed(args.out, chosen=picks, ahead=guesses, experts=spec.experts)
    print(f"{len(picks)} tokens, {spec.layers} layers of {k} of {spec.experts} experts -> {args.out}")
    print(f"of the last token again {again:.0%}, of the predictions right {right:.0%}")


def make(args: argparse.Namespace) -> None:
    """Write the random file."""
    write_random(args.out, shape(args.shape), "q4")
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB")


class Replay:
    """Makes a model route as a trace says, by the biases of routers that are zero."""

    def __init__(self, weights: Weights, trace: dict[str, NDArray[np.int16]]) -> None:
        spec = weights.spec
        size = page_padded(spec.experts * 4)
        at = page_padded(weights.data.size)
        self.data = np.zeros(at + 2 * spec.layers * size, np.uint8)
        self.data[: weights.data.size] = weights.data
        weights.data = self.data[: weights.data.size]  # the first copy goes: it would count as resident
        tensors = dict(weights.tensors)
        self.bias: list[NDArray[np.float32]] = []  # [E] of each layer, then of each layer's prediction
        self.places: list[int] = []
        for i in range(2 * spec.layers):
            start = at + i * size
            self.places.append(start)
            self.bias.append(self.data[start : start + spec.experts * 4].view(np.float32))
        for layer in range(spec.layers):
            router = tensors[f"layers.{layer}.router"]
            self.data[router.offset : router.offset + router.nbytes] = 0
            name = f"layers.{layer}.router_bias"
            tensors[name] = StoredTensor(
                name, "vector", (spec.experts,), "f32", "flat", self.places[layer], spec.experts * 4, ""
            )
        self.weights = Weights(spec, self.data, tensors)
        self._trace, self._spec = trace, spec

    def attach(self, forward: Forward) -> None:
        """Give the predicting products their own biases: they share the routers' otherwise."""
        code = forward.code
        column = 3 + program.FIELDS[program.MATMUL].index("bias")
        layers = self._spec.layers
        own = dict(zip(self.places[:layers], self.places[layers:], strict=True))
        for row in code:
            if row[0] == program.MATMUL and row[1] == program.FORESEEN:
                row[column] = own[int(row[column])]

    def set(self, token: int) -> None:
        """Route as token number `token` of the trace."""
        layers, experts = self._spec.layers, self._spec.experts
        for i in range(layers):
            for kind, bias in (("chosen", self.bias[i]), ("ahead", self.bias[layers + i])):
                picks = self._picks(kind, token, i)
                bias[:] = 0
                bias[picks] = np.linspace(9, 8, len(picks), dtype=np.float32)
        assert experts == len(self.bias[0])

    def _picks(self, kind: str, token: int, layer: int) -> NDArray[np.int64]:
        """Ours that stand for those of the trace."""
        values = self._trace[kind]
        tokens, layers, active = values.shape
        theirs = int(self._trace["experts"])
        wide = self._spec.experts // theirs
        # Layers beyond the trace's own repeat its text from another place.
        turn, own = divmod(layer, layers)
        shift = turn * (tokens // max(1, self._spec.layers // layers))
        picks = values[(token + shift) % tokens, own].astype(np.int64)
        if picks[0] < 0:  # nothing is predicted for a first layer of the trace: what was there before
            picks = (
                values[(token + shift - 1) % tokens, own]
                if kind == "chosen"
                else self._trace["chosen"][(token + shift - 1) % tokens, own].astype(np.int64)
            )
        per = -(-self._spec.active_experts // active)
        found = (picks[:, None] * wide + (np.arange(per) * (wide // per) + layer) % wide).reshape(-1)
        return found[: self._spec.active_experts]


def case(args: argparse.Namespace) -> None:
    """One measurement, in this process; prints one JSON object."""
    streaming = CASES[args.case]
    trace = dict(np.load(args.trace))
    with ErtFile.open(args.model) as file:
        expert_bytes = tuple(page_padded(t.nbytes) for t in file.tensors.values() if t.role == "expert")
        config = plan(
            *(file.spec, file.size),
            context=CONTEXT,
            threads=args.threads,
            ram=parse_size(args.ram),
            expert_bytes=expert_bytes,
            chunk=8,
        )
        slots = file.spec.active_experts if args.case in ("on demand", "mapped") else config.expert_slots
        weights, store = open_streamed(file, slots, streaming or Streaming(predictor="none"))
        replay = Replay(weights, trace)
        if streaming is None:  # the program looks into the mapping, where every expert is
            store.arena = file.data
            store.table[: store.control] = Weights.of_file(file).expert_table().reshape(-1)
        forward = Forward(replay.weights, config, store)
        replay.attach(forward)
    drop_cache(args.model)
    before, began = None, 0.0
    for token in range(WARM + args.tokens):
        if token == WARM:
            before = forward.store.totals() if forward.store else {}
            began = time.perf_counter()
        replay.set(token)
        if forward.cache.length + 1 >= CONTEXT:
            forward.cache.rewind(0)
        forward.run([token % 1000 + 3])
    seconds = time.perf_counter() - began
    stats = forward.store.report(before or {}) if forward.store else {}
    forward.close()
    found = {"tok_s": args.tokens / seconds, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes(), **stats}
    print(json.dumps(found))


def drop_cache(path: Path) -> None:
    """Let no page of the file be in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def bandwidth(path: Path, size: int) -> float:
    """Bytes per second of O_DIRECT reads of `size` bytes at random places."""
    import mmap

    from edgert.experts import FileSegments

    segments, rng = FileSegments(path), np.random.default_rng(0)
    memory, places = memoryview(mmap.mmap(-1, size)), (path.stat().st_size - size) // 4096
    try:
        segments.read(0, memory)
        began = time.perf_counter()
        for _ in range(64):
            segments.read(int(rng.integers(places)) * 4096, memory)
        return 64 * size / (time.perf_counter() - began)
    finally:
        segments.close()


def run(args: argparse.Namespace) -> None:
    """Every case at every budget, interleaved over the repeats; medians."""
    with ErtFile.open(args.model) as file:
        size = max(page_padded(t.nbytes) for t in file.tensors.values() if t.role == "expert")
    speed = bandwidth(args.model, size)
    print(f"{args.model.name}: reads of {size / 1e6:.2f} MB at {speed / 1e9:.2f} GB/s", flush=True)
    names = args.case or list(CASES)
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for ram in args.ram:
            for name in names:
                found = _in_a_process(args, name, ram)
                if found is not None:
                    print(_line(ram, name, found, speed), flush=True)
                    results.setdefault((ram, name), []).append(found)
    table = []
    print("medians", flush=True)
    for (ram, name), runs in results.items():
        runs.sort(key=lambda r: r["tok_s"])
        middle = runs[len(runs) // 2]
        table.append({"ram": ram, "case": name, "bandwidth": speed, **middle})
        print(_line(ram, name, middle, speed), flush=True)
    if args.out:
        args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _line(ram: str, name: str, found: dict[str, float], speed: float) -> str:
    text = f"{ram:>7} {name:26} {found['tok_s']:7.2f} tok/s, peak {found['peak_rss_bytes'] / 2**20:6.0f} MiB"
    if CASES[name] is None:
        return text
    asked = found["expert_hits"] + found["expert_misses"]
    return (
        f"{text}, hits {found['expert_hits'] / asked:5.1%}, read {found['bytes_read'] / 1e9:6.2f} GB, "
        f"wait {found['io_wait_s']:6.2f} s of {found['seconds']:6.2f} s, bytes/bandwidth "
        f"{found['bytes_read'] / speed:6.2f} s, useful {found['prefetch_useful']:.0f} of "
        f"{found['prefetched']:.0f}, {found['prefetch']}"
    )


def _in_a_process(args: argparse.Namespace, name: str, ram: str) -> dict[str, float] | None:
    command = [sys.executable, __file__, "case", str(args.model), "--trace", str(args.trace)]
    command += ["--case", name, "--ram", ram, "--tokens", str(args.tokens), "--threads", str(args.threads)]
    group = _memory_group(parse_size(ram)) if CASES[name] is None else None
    if CASES[name] is None and group is None:
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
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
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
    sub = commands.add_parser("record")
    sub.set_defaults(work=record)
    sub.add_argument("model", type=Path)
    sub.add_argument("--text", type=Path, required=True)
    sub.add_argument("--last", type=int, default=10, help="lines from the end of the text")
    sub.add_argument("-o", "--out", type=Path, required=True)
    sub = commands.add_parser("make")
    sub.set_defaults(work=make)
    sub.add_argument("--shape", default="olmoe-1b-7b")
    sub.add_argument("-o", "--out", type=Path, required=True)
    for name, work in (("run", run), ("case", case)):
        sub = commands.add_parser(name)
        sub.set_defaults(work=work)
        sub.add_argument("model", type=Path)
        sub.add_argument("--trace", type=Path, required=True)
        sub.add_argument("--tokens", type=int, default=256)
        sub.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
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
