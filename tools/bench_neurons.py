"""What streaming neurons from flash is worth: speed and bytes of a model of which half the feed-forward fits.

    python tools/bench_neurons.py all -o FOLDER          # 4 GB of disk, some 4 minutes
    python tools/bench_neurons.py run FOLDER/neurons.ert --case streamed --case resident
    python tools/bench_neurons.py hits --text FILE     # what the cache keeps of the bundled target's neurons

`all` writes random weights of a shape (Llama-2-7B with ReLU), their gates planted so that a chosen share of
the activations is zero and neurons fire as unequally as those of the bundled target (bench_sparsity.py),
those that fire most first; then it times every case, each in a process of its own, the file's pages dropped
before. What is in FOLDER already is used again. FOLDER/neurons.json and FOLDER/neurons.md are the result.

Memory holds the gates, the scales of down and the neurons that make it half of the bytes of gate, up and
down; attention and embedding are in memory too. Inputs of successive tokens are correlated (--likeness), so
that of the neurons that fire 40% fired for the token before, as in the target; with the same frequencies and
no memory it would be 17% (in the target 25%).

The cases add one part after the other:

    on demand   all neurons that are not in memory are read for every token, in order, 1 MiB at a time, four
                reads at once, each layer before it is computed; in memory are those that fire most
    two phases  gate first, then only the neurons that fire: row of up and column of down, one read each
    bundles     up and down of a neuron in one read
    runs        neurons with less than 16 KiB between them in one read
    cache       memory keeps those that are used, instead of those that fire most
    streamed    and computes what is there while the others come: the defaults
    pinned      as streamed, half of the memory for those that fire most
    resident    everything in memory, for comparison
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_experts import drop_cache
from bench_sparsity import planted
from numpy.typing import NDArray

import edgert
from edgert.config import EngineConfig, ModelSpec
from edgert.converters.hottest_first import Firing, sparsity_metadata
from edgert.evaluate import read_documents
from edgert.flash import Streaming
from edgert.format import ErtFile, ErtWriter
from edgert.format.layout import QUANTIZED
from edgert.format.sparsity import QUANTILES
from edgert.kernels import program
from edgert.kernels.neuron_packing import NeuronShape
from edgert.model.forward import Forward
from edgert.model.shapes import random_weights, shape
from edgert.neurons import NeuronStore, open_streamed
from edgert.neurons.store import DEFAULT_READS, Reads
from edgert.resident import peak_rss_bytes
from edgert.state import Weights

CONTEXT = 256
LARGE = 100
"""Of inputs, beside which what layers add is little: so all layers see the same likeness of tokens."""
EVERYTHING, NOTHING = 1 << 40, -1


@dataclass(frozen=True)
class Case:
    """One way to run the model."""

    reads: Reads = DEFAULT_READS
    overlap: bool = True
    pinned: float = 0.0
    readers: int = 0
    resident: bool = False


CASES = {
    "on demand": Case(Reads(gap=EVERYTHING, longest=1 << 20), False, 0.99, 4),
    "two phases": Case(Reads(gap=NOTHING, piece=4096), False, 0.99),
    "bundles": Case(Reads(gap=NOTHING), False, 0.99),
    "runs": Case(DEFAULT_READS, False, 0.99),
    "cache": Case(DEFAULT_READS, False),
    "streamed": Case(),
    "pinned": Case(pinned=0.5),
    "resident": Case(resident=True),
}


def write(path: Path, spec: ModelSpec, zeros: float) -> None:
    """Random weights with planted gates as a file."""
    weights = random_weights(spec, "q4")
    planted(weights, zeros, hottest_first=True)
    nothing = np.arange(spec.ffn_width)
    layer = Firing(1.0, zeros, tuple(0.0 for _ in QUANTILES), nothing)
    quants = {t.name: t.quant for t in weights.tensors.values() if t.role in QUANTIZED}
    metadata = {"source": "random weights", **sparsity_metadata(zeros, [layer] * spec.layers)}
    with ErtWriter(path, spec, quants, metadata=metadata) as writer:
        for tensor in weights.tensors.values():
            writer.write(tensor.name, weights.data[tensor.offset : tensor.offset + tensor.nbytes])
        writer.finish()


def slots_of(file: ErtFile) -> int:
    """Neurons in memory, so that with gates and scales half of the feed-forward's bytes are."""
    spec = file.spec
    held = [t for t in file.tensors.values() if t.role == "neurons"]
    gates = sum(t.nbytes for name, t in file.tensors.items() if name.endswith(".gate"))
    sizes = NeuronShape.of(held[0].quant, spec.width)
    scales = sum(t.nbytes // sizes.cluster * sizes.scales for t in held)
    half = (gates + sum(t.nbytes for t in held)) // 2
    return max(spec.ffn_width, (half - gates - scales) // (sizes.up + sizes.down))


class Inputs:
    """Rows [1, D], each as like the one before as `likeness` (the cosine of the angle between them)."""

    def __init__(self, width: int, likeness: float) -> None:
        self._rng, self._likeness = np.random.default_rng(5), likeness
        self._row = self._rng.standard_normal((1, width), np.float32)

    def next(self) -> NDArray[np.float32]:
        """One more."""
        fresh = self._rng.standard_normal(self._row.shape, np.float32)
        a = np.float32(self._likeness)
        self._row = a * self._row + np.sqrt(1 - a * a) * fresh
        return self._row * np.float32(LARGE)


def case(args: argparse.Namespace) -> None:
    """One measurement, in this process; prints one JSON object."""
    chosen = CASES[args.case]
    with ExitStack() as stack:
        file = stack.enter_context(ErtFile.open(args.model))
        spec, slots = file.spec, slots_of(file)
        weights, store = Weights.of_file(file), None
        drop_cache(args.model)
        if not chosen.resident:
            most = 1 - spec.ffn_width / slots  # a layer's neurons need room beside
            streaming = Streaming(
                overlap=chosen.overlap, pinned=min(most, chosen.pinned), readers=chosen.readers
            )
            weights, store = open_streamed(file, slots, streaming, reads=chosen.reads)
        config = EngineConfig(args.threads, CONTEXT, 8, thresholds=(1.0,) * spec.layers, slots=slots)
        forward = stack.enter_context(closing(Forward(weights, config, store)))
        forward.whole = 0  # the threshold makes the zeros that are planted, from the first token on
        rows = Inputs(spec.width, args.likeness)
        tokens(forward, rows, args.warm, args.seconds)
        before, began = store.totals() if store else {}, time.perf_counter()
        count = tokens(forward, rows, args.tokens, args.seconds)
        seconds = time.perf_counter() - began
        found: dict[str, Any] = {"tokens": count, "tok_s": count / seconds, "seconds": seconds}
        found |= store.report(before) if isinstance(store, NeuronStore) else firing(forward, rows)
        print(json.dumps({**found, "peak_rss_bytes": peak_rss_bytes()}))


def tokens(forward: Forward, rows: Inputs, count: int, seconds: float) -> int:
    """Compute so many tokens, or those that the time allows; how many."""
    end = time.perf_counter() + seconds
    for done in range(count):
        if time.perf_counter() > end:
            return done
        if forward.cache.length + 1 >= CONTEXT:
            forward.cache.rewind(0)
        forward.run([0], outputs=[0], hidden=rows.next())
    return count


def firing(forward: Forward, rows: Inputs, count: int = 12) -> dict[str, float]:
    """The share of activations that are zero, and of those that are not, how many were not before either."""
    code, lists = forward.code, []
    live = 3 + program.FIELDS[program.NEURONS_UP].index("live")

    def grab(operation: int) -> None:
        at = int(code[operation, live])
        fires = np.zeros(forward.spec.ffn_width, bool)
        fires[forward.state.routes[at + 1 : at + 1 + forward.state.routes[at]]] = True
        lists.append(fires)

    for i in np.flatnonzero(code[:, 0] == program.NEURONS_UP).tolist():
        forward.watch[i] = lambda count, i=i: grab(i)
    tokens(forward, rows, count, 1e9)
    forward.watch.clear()
    fires = np.array(lists).reshape(count, -1)
    again = (fires[1:] & fires[:-1]).sum() / fires[1:].sum()
    often = fires.mean(axis=0)
    return {"zeros": 1 - float(fires.mean()), "again": float(again), "busiest": float(often.max())}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, in a process of its own."""
    rows = []
    for name in args.case or CASES:
        command = [sys.executable, __file__, "case", str(args.model), "--case", name]
        for option in ("tokens", "warm", "seconds", "threads", "likeness"):
            command += [f"--{option}", str(getattr(args, option))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr}")
        rows.append({"case": name, **json.loads(done.stdout.splitlines()[-1])})
        print(f"{name}: {rows[-1]['tok_s']:.2f} tok/s", flush=True)
    print(markdown(rows))
    return rows


def hits(args: argparse.Namespace) -> None:
    """What the cache keeps of what fires in the bundled target, with room for a share of its neurons."""
    documents = read_documents(args.text, args.last)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "target.ert"
        edgert.convert(Path(edgert.__file__).parent / "assets" / "target", path, "q4", sparsity="exact")
        with edgert.load(path, threads=1) as model:
            texts = [model.tokenizer.encode(document)[: CONTEXT - 1] for document in documents]
        for share in args.share:
            with ErtFile.open(path) as file:
                spec = file.spec
                weights, store = open_streamed(file, int(share * spec.layers * spec.ffn_width), Streaming())
                with closing(Forward(weights, EngineConfig(1, CONTEXT, 8), store)) as forward:
                    for text in texts:
                        forward.cache.rewind(0)
                        for token in text:
                            forward.run([token])
                    found = store.totals()
            kept = found["hits"] / (found["hits"] + found["misses"])
            print(f"room for {share:.0%}: {kept:.1%} of what fired was there", flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    slowest = next((row["tok_s"] for row in rows if row["case"] == "on demand"), None)
    heads = ("case", "tok/s", "of on demand", "of before", "hits", "reads a token", "MB a token", "waited")
    lines = ["| " + " | ".join((*heads, "peak RSS, MiB")) + " |", "|---|" + "---:|" * len(heads)]
    before = None
    for row in rows:
        over = f"{row['tok_s'] / slowest:.2f}" if slowest else ""
        step = f"{row['tok_s'] / before:.2f}" if before else ""
        cells = [row["case"], f"{row['tok_s']:.2f}", over, step]
        before = row["tok_s"]
        if "reads" in row:
            asked = max(1, row["neuron_hits"] + row["neuron_misses"])
            cells += [f"{row['neuron_hits'] / asked:.0%}", f"{row['reads'] / row['tokens']:.0f}"]
            cells += [
                f"{row['bytes_read'] / row['tokens'] / 1e6:.0f}",
                f"{row['io_wait_s'] / row['seconds']:.0%}",
            ]
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join([*cells, f"{row['peak_rss_bytes'] / 2**20:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def everything(args: argparse.Namespace) -> None:
    """The file, and all cases."""
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    args.model = args.out / "neurons.ert"
    spec = shape(args.shape)
    if not args.model.exists():
        write(args.model, replace(spec, layers=args.layers or spec.layers), args.zeros)
        print(f"{args.model.stat().st_size / 1e9:.2f} GB written", flush=True)
    rows = run(args)
    found = {"shape": args.shape, "zeros": args.zeros, "likeness": args.likeness, "cases": rows}
    found |= {"file_bytes": args.model.stat().st_size, "threads": args.threads}
    (args.out / "neurons.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (args.out / "neurons.md").write_text(markdown(rows), encoding="utf-8")
    print(f"{time.perf_counter() - began:.0f} s in all; written to {args.out}")


def parse_args() -> argparse.Namespace:
    """The sub-command's arguments; `work` is its function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("hits")
    sub.set_defaults(work=hits)
    sub.add_argument("--text", type=Path, required=True, help="a story or a JSON object per line")
    sub.add_argument("--last", type=int, default=10, help="lines from the end of the text")
    sub.add_argument("--share", type=float, nargs="+", default=[0.2, 0.35, 0.5])
    for name, work in (("all", everything), ("run", run), ("case", case)):
        sub = commands.add_parser(name)
        sub.set_defaults(work=work, case=None)
        sub.add_argument("--tokens", type=int, default=64)
        sub.add_argument("--warm", type=int, default=48, help="tokens before the clock starts")
        sub.add_argument("--seconds", type=float, default=7.0, help="most to warm up, and most to measure")
        sub.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        sub.add_argument("--likeness", type=float, default=0.42)
        if work is everything:
            sub.add_argument("--shape", default="prosparse-llama-2-7b")
            sub.add_argument("--layers", type=int, help="fewer layers than the shape has")
            sub.add_argument("--zeros", type=float, default=0.85)
            sub.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER")
            continue
        sub.add_argument("model", type=Path)
        if work is run:
            sub.add_argument("--case", action="append", choices=CASES)
        else:
            sub.add_argument("--case", choices=CASES, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    arguments.work(arguments)
