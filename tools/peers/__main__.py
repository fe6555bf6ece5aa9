"""The command: prepare the models, measure, write JSON, page and plot."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import edgert

from .machine import machine, versions
from .measure import PACKAGE_ROOT, Counts, Runtime, agreement, loaded, run_group
from .prepare import SMOKE, Workshop, matrix_parameters
from .report import bars, render
from .results import Group, Model, Results

DRAFT = Path(edgert.__file__).parent / "assets" / "draft"
"""The bundled model that peers run too: llama.cpp has no ReLU for the target's layout."""
SMALL_COUNTS = Counts(prompt=256, generate=256, depth=0, rows=(), stream=False)
"""A small model has a short context, and its tests are over in milliseconds."""
SMOKE_COUNTS = Counts(prompt=32, generate=8, depth=128, rows=(1, 4, 8), stream=True)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to measure."""

    name: str
    role: Literal["shape", "small"]
    weights: str
    parameters: int
    runtimes: list[Runtime]
    counts: Counts

    def model(self, infos: dict[str, Any], alike: float | None) -> Model:
        """With what the runtimes said when they had loaded it."""
        sizes = {name: info["weight_bytes"] for name, info in infos.items()}
        return Model(self.name, self.role, self.weights, self.parameters, sizes, alike)


def main() -> None:
    """Parse the arguments, then measure or only render."""
    options = _parser().parse_args()
    if options.from_json:
        results = Results.read(options.from_json)
    else:
        results = _measured(options)
        if options.json:
            results.write(options.json)
    plot = options.plot
    if plot:
        _draw(results, plot, options.peers_python)
    if options.report:
        address = os.path.relpath(plot, options.report.parent) if plot else None
        options.report.write_text(render(results, address))
    else:
        print(render(results, None))


def _measured(options: argparse.Namespace) -> Results:
    options.work_dir.mkdir(parents=True, exist_ok=True)
    about, found = machine(), versions()
    models: dict[str, Model] = {}
    groups: list[Group] = []
    for subject in _subjects(options):
        for threads in options.threads:
            group, infos, alike = _measure(subject, threads, options)
            groups.append(group)
            models[subject.name] = subject.model(infos, alike)
            found |= {name: info["version"] for name, info in infos.items()}
            found |= {f"{name} system": info["system"] for name, info in infos.items() if "system" in info}
    about["load after"] = f"{os.getloadavg()[0]:.2f}"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Results(date, _command(), options.repeats, about, found, list(models.values()), groups)


def _measure(
    subject: Subject, threads: int, options: argparse.Namespace
) -> tuple[Group, dict[str, Any], float | None]:
    """The group, what the runtimes say of themselves, and how well they agree where that can be told."""
    # The deep test takes a minute to fill each cache: once is enough.
    deep = subject.counts.depth if threads == max(options.threads) else 0
    counts = replace(subject.counts, depth=deep)
    with loaded(subject.runtimes, threads, counts.context(), options.work_dir) as (workers, infos):
        alike = agreement(workers) if subject.role == "small" else None
        group = run_group(subject.name, threads, workers, infos, counts, options.repeats)
    return group, infos, alike


def _subjects(options: argparse.Namespace) -> list[Subject]:
    workshop = Workshop(options.work_dir.resolve(), sys.executable, options.peers_python)
    found = []
    if options.small and options.small.is_dir():  # first: should the runtimes not agree, it ends at once
        spec, runtimes = workshop.folder_model(options.small)
        counts = replace(SMOKE_COUNTS, depth=0, rows=(), stream=False) if options.smoke else SMALL_COUNTS
        size = matrix_parameters(spec)
        found.append(Subject(options.small.resolve().name, "small", "trained", size, runtimes, counts))
    elif options.small:
        print(f"{options.small}: no such folder, the small model is left out", file=sys.stderr)
    if options.shape:
        spec, runtimes = workshop.shape(options.shape, with_ort=not options.no_ort)
        counts = SMOKE_COUNTS if options.smoke else _counts(options)
        size = matrix_parameters(spec)
        found.append(Subject(options.shape, "shape", "random", size, runtimes, counts))
    return found


def _counts(options: argparse.Namespace) -> Counts:
    return Counts(options.prompt, options.generate, options.depth, options.rows, stream=True)


def _draw(results: Results, plot: Path, python: str) -> None:
    subprocess.run(
        [python, "-m", "peers.plot", str(plot)],
        input=json.dumps(bars(results)),
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)},
    )


def _command() -> str:
    """As it was typed, but without the folders of this machine."""
    shown = []
    for argument in sys.argv[1:]:
        option, equals, value = argument.rpartition("=")
        shown.append(f"{option}{equals}PATH/{Path(value).name}" if Path(value).is_absolute() else argument)
    return " ".join(["tools/bench_peers", *shown])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench_peers",
        description="edgert beside llama.cpp and onnxruntime-genai, interleaved: medians and ratios.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--peers-python", default=sys.executable, help="interpreter with the packages of the extra `peers`")
    add("--work-dir", type=Path, default=Path("build/bench_peers"), help="takes the models: some GB")
    add("--shape", default="llama-3.2-1b", help="shape of random weights; empty for none")
    add("--small", type=Path, default=DRAFT, help="Hugging Face folder of a small real model")
    add("--threads", type=_numbers, default=(1, 2), help="numbers of threads, with commas between")
    add("--repeats", type=int, default=7, help="rounds")
    add("--prompt", type=int, default=512, help="tokens of the prompt test")
    add("--generate", type=int, default=64, help="tokens of the generation tests")
    add("--depth", type=int, default=4096, help="tokens before the deep generation test; 0 for no such test")
    add("--rows", type=_numbers, default=(1, 2, 4, 8, 16), help="rows of the forwards, 1 first, 64 at most")
    add("--no-ort", action="store_true", help="leave onnxruntime-genai out")
    add("--json", type=Path, help="write every timing to this file")
    add("--report", type=Path, help="write the page to this file instead of printing it")
    add("--plot", type=Path, help="draw the ratios into this .svg or .png file")
    add("--from-json", type=Path, help="measure nothing, render this file")
    add("--smoke", action="store_true", help=f"tiny counts; with --shape {SMOKE} all is over in a minute")
    return parser


if __name__ == "__main__":
    main()
