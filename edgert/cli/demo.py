"""`edgert demo`: the bundled family through everything there is, in under a minute."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import click

from edgert.cli.options import size_text
from edgert.config import QUANTS
from edgert.converters import convert, split
from edgert.errors import DeviceError
from edgert.events import Completion
from edgert.format import ErtFile
from edgert.format.layout import page_padded
from edgert.handoff.setup import HandoffConfig, check_cloud_installed
from edgert.planner import BASE_BYTES, cores, plan, run_bytes
from edgert.runtime import Model, load
from edgert.warmup import warm_up

PROMPT = "Once upon a time"
FAMILY = ("target", "draft", "moe")
SPLIT_LAYER = 3
"""Layers of the target that stay on the board, its first exit among them."""
_TOKENS = 120
_QUANT: Any = "q8"


def bundled_model(name: str = "target") -> AbstractContextManager[Path]:
    """The folder of a model that comes with edgert, as Hugging Face lays it out."""
    return resources.as_file(resources.files("edgert") / "assets" / name)


@dataclass(frozen=True, slots=True)
class Family:
    """What there is to run."""

    files: Mapping[str, Path]  # converted, by name
    cloud: str | None  # where the other half of the split target is served; None where it cannot be


@dataclass(frozen=True, slots=True)
class Way:
    """One way to generate a text; unless it says otherwise, with the tokens of plain generation."""

    name: str
    model: str = "target"
    options: Callable[[Family], dict[str, Any]] = field(default=lambda family: {})  # for `load`
    saved: Callable[[Completion], str] = field(default=lambda done: "")  # what it did better than plain
    file: str = ""  # of those converted; that of the model if not given


def _exits(done: Completion) -> str:
    """How much of the upper layers an early exit spared."""
    stats = done.stats
    return f"{stats['exits']} of {len(done.tokens)} tokens answered after a part of the layers (approximate)"


def _fired(done: Completion) -> str:
    """How many neurons were read."""
    return f"{done.stats['neurons_read']:.0%} of the neurons read"


def _handed_over(done: Completion) -> str:
    """How often the other half was asked, which is another process."""
    stats = done.stats
    return f"{stats['exits']} tokens from this half, {stats['handoffs']} from another process (approximate)"


def _passes(done: Completion) -> str:
    """How often the weights were read for a text that speculation wrote."""
    passes = done.stats["verifications"] + done.stats["fallback_steps"]
    return f"{len(done.tokens)} tokens in {passes} passes over the weights"


def _room_for_half(path: Path) -> int:
    """The `ram` in which half of a model's experts fit."""
    with closing(ErtFile.open(path)) as file:
        experts = sum(page_padded(t.nbytes) for t in file.tensors.values() if t.role == "expert")
        config = plan(file.spec, file.size, threads=1)
        return BASE_BYTES + run_bytes(file.spec, config) + file.size - experts // 2


def _reads(done: Completion) -> str:
    """What was read from the file instead of being held."""
    stats = done.stats
    hits, read = stats["expert_hits"], stats["bytes_read"]
    share = hits / (hits + stats["misses"])
    return f"half of the experts in memory: {share:.0%} found there, {size_text(read)} read"


WAYS = (
    Way("plain"),
    Way("sparse", saved=_fired, file="sparse"),
    Way("all cores", options=lambda family: {"threads": cores()}),
    Way("speculative, draft", options=lambda family: {"draft": family.files["draft"]}, saved=_passes),
    Way("speculative, exits", options=lambda family: {"draft": "exit"}, saved=_passes),
    Way("speculative, lookup", options=lambda family: {"draft": "lookup"}, saved=_passes),
    Way(
        "early exits, 98 %",
        options=lambda family: {"handoff": HandoffConfig("local", agreement=0.98)},
        saved=_exits,
    ),
    Way(
        "split, 98 %",
        options=lambda family: {"handoff": HandoffConfig("collaborative", family.cloud, agreement=0.98)},
        saved=_handed_over,
        file="edge",
    ),
    Way("plain", model="moe"),
    Way("streamed experts", "moe", lambda family: {"ram": _room_for_half(family.files["moe"])}, _reads),
    Way("plain", model="draft"),
)
"""What the demo shows, in its order; the first way of a model is what the others are compared with."""


@click.command("demo")
@click.option(
    "-p", "--prompt", default=PROMPT, show_default=True, metavar="TEXT", help="How the story begins."
)
def demo_command(prompt: str) -> None:
    """Convert the bundled family and let it write, plainly and with every acceleration."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        files = _convert_family(Path(scratch))
        began = time.perf_counter()
        warm_up()  # all at once: what a row compiled would not fit into the memory that it is given
        cloud = stack.enter_context(_serving(files["cloud"]))
        with load(files["target"], threads=1) as model:
            model.generate(prompt, max_tokens=1)
            seconds = time.perf_counter() - began
            print(f"start    {seconds:.1f} s (compiles the kernels where they are not cached)\n")
            _tell(model, prompt)
        _show_ways(Family(files, cloud), prompt)
        _show_precisions(Path(scratch), prompt)


def _convert_family(scratch: Path) -> dict[str, Path]:
    files = {}
    for name in FAMILY:
        files[name] = scratch / f"{name}.ert"
        with bundled_model(name) as folder:
            report = convert(folder, files[name], _QUANT)
        print(
            f"convert  {name:<7} {report.parameters / 1e6:5.2f} M weights to {size_text(report.file_bytes)}, "
            f"{report.seconds:.1f} s"
        )
    with bundled_model() as folder:
        files["sparse"] = scratch / "sparse.ert"
        convert(folder, files["sparse"], _QUANT, sparsity="exact")
    files["edge"], files["cloud"] = scratch / "edge.ert", scratch / "cloud.ert"
    split(files["target"], SPLIT_LAYER, files["edge"], files["cloud"])
    return files


@contextmanager
def _serving(file: Path) -> Iterator[str | None]:
    """The address at which another process serves the upper half; None where its packages are missing."""
    try:
        check_cloud_installed()
    except DeviceError:
        yield None
        return
    command = [sys.executable, "-m", "edgert", "cloud", str(file), "--listen", "127.0.0.1:0", "-t", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r" at (\S+:\d+),", process.stdout.readline())
            if found is None:
                raise DeviceError(f"the process that serves {file.name} did not start; see: edgert cloud")
            yield found[1]
        finally:
            process.terminate()


def _tell(model: Model, prompt: str) -> None:
    print(prompt, end="")
    for event in model.stream(prompt, max_tokens=_TOKENS):
        print(event.text, end="", flush=True)
    print("\n")
    sys.stdout.flush()


def _show_ways(family: Family, prompt: str) -> None:
    """The same story, greedily, by every way: its speed, whether it is the same, and what was saved."""
    print(f"{'model':<7} {'way':<20} {'tokens/s':>9}  {'as plain':<11} what was saved")
    plain: dict[str, Completion] = {}
    for way in WAYS:
        if way.file == "edge" and family.cloud is None:
            print(f"{way.model:<7} {way.name:<20} {'-':>9}  needs: pip install 'edgert[cloud]'")
            continue
        options = {"threads": 1} | way.options(family)
        with load(family.files[way.file or way.model], **options) as model:
            done = model.generate(prompt, max_tokens=_TOKENS)
        first = plain.setdefault(way.model, done)
        same = "" if first is done else _alike(first.tokens, done.tokens)
        rate = done.timings.decode_tok_s
        print(
            f"{way.model:<7} {way.name:<20} {rate:>9.0f}  {same:<11} {way.saved(done)}".rstrip(), flush=True
        )
    for name in FAMILY[1:]:
        print(f"\n{name} writes:\n{prompt}{plain[name].text}")
    print()


def _show_precisions(scratch: Path, prompt: str) -> None:
    """The target in every precision: its size and speed, and where the story parts from that of f32."""
    print(f"{'weights':<8} {'size':>10} {'tokens/s':>9}  tokens as with f32")
    exact: tuple[int, ...] = ()
    for quant in QUANTS:
        path = scratch / f"target-{quant}.ert"
        with bundled_model() as folder:
            size = convert(folder, path, quant).file_bytes
        with load(path, threads=1) as model:
            done = model.generate(prompt, max_tokens=_TOKENS)
        exact = exact or done.tokens
        rate = done.timings.decode_tok_s
        print(f"{quant:<8} {size_text(size):>10} {rate:>9.0f}  {_alike(exact, done.tokens)}", flush=True)


def _alike(expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    """How far two texts go together."""
    pairs = enumerate(zip(expected, found, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    return "all" if found == expected else f"{first} of {len(expected)}"
