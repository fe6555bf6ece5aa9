"""`edgert train draft`, `edgert train exits` and `edgert train predictor`."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edgert.cli.options import FILE, trust_text
from edgert.errors import UsageError
from edgert.training import require_libraries

if TYPE_CHECKING:
    from edgert.training.corpus import Corpus
    from edgert.training.run import Report, Run
    from edgert.training.teacher import Teacher

Command = TypeVar("Command", bound=Callable[..., Any])
_DEFAULT_STEPS = {"draft": 3000, "exits": 500, "predictor": 300}
_PREDICTOR_RATE = 2e-2
"""After 100 steps a loss of 0.353, where 6e-3 had come to 0.397 (bundled target)."""
_LONG_STEPS = 300  # compiling takes as long as some ten to a hundred steps


def _training_options(function: Command) -> Command:
    """What both kinds of training ask for."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object."),
        click.option(
            "--compile/--no-compile", "compiled", default=None, help="torch.compile. [default: on long runs]"
        ),
        click.option(
            "--half/--no-half", default=None, help="Products in bfloat16. [default: where it is fast]"
        ),
        click.option("-t", "--threads", type=click.IntRange(min=1), help="CPU threads. [default: all cores]"),
        click.option("--device", help="cpu or cuda. [default: cuda where there is one]"),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Of text order and first weights."
        ),
        click.option(
            "--rate", type=float, help="Peak learning rate. [default: 6e-3, predictor 2e-2; less if wide]"
        ),
        click.option("--row-tokens", type=int, help="Tokens of a row. [default: 512, or the context]"),
        click.option(
            "--rows", type=click.IntRange(min=1), default=8, show_default=True, help="Rows per step."
        ),
        click.option("--minutes", type=float, help="Stop after so long, in all."),
        click.option(
            "--steps",
            type=click.IntRange(min=1),
            help="Stop after so many. [default: 3000, exits 500, predictor 300]",
        ),
        click.option(
            "--held-out",
            type=click.IntRange(min=1),
            default=200,
            show_default=True,
            help="Documents at the end of the text to measure on, never trained on; at most a tenth.",
        ),
        click.option("--text", type=FILE, required=True, help='A text, or .jsonl of {"text": ...}.'),
    ):
        function = option(function)
    return function


@click.group("train")
def train_command() -> None:
    """Train what a model needs for its accelerations, on its own outputs.

    MODEL is a Hugging Face folder of any architecture that edgert converts. Interrupted, the same command
    goes on from its last checkpoint. Needs the extra `train`: pip install 'edgert[train]'.
    """


@train_command.command("draft", short_help="A small model that guesses what MODEL says.")
@click.argument("model", type=FILE)
@click.option(
    "-o", "--output", type=FILE, required=True, help="The folder to write, as of a Hugging Face model."
)
@click.option("--width", type=int, help="Of the draft. [default: for a tenth of MODEL's weights]")
@click.option("--layers", type=int, help="Of the draft. [default: a third of MODEL's]")
@click.option("--ffn", type=int, help="Feed-forward width of the draft. [default: 2.5 of its width]")
@click.option(
    "--sampled",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    help="Share of the rows that MODEL goes on with itself.",
)
@_training_options
def draft_command(
    model: Path,
    output: Path,
    width: int | None,
    layers: int | None,
    ffn: int | None,
    sampled: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Distil a small model with the same tokens that guesses what MODEL says, for speculation."""
    require_libraries()
    from edgert.training.draft import choose_shape, train_draft

    teacher, corpus, run = _prepare(model, "draft", options)
    shape = choose_shape(teacher.spec, width, layers, ffn)
    run = _with_rate(run, shape.width, options["rate"])
    _say(f"draft of {shape.parameters / 1e6:.2f} M weights: width {shape.width}, {shape.layers} layers")
    with _Bar("draft") as report:
        found = train_draft(teacher, corpus, shape, run, sampled, output, report)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    print(
        f"{output}: {found.parameters / 1e6:.2f} M weights. On {found.tokens} held-out tokens its first "
        f"choice is the model's for {found.agreement:.1%}, and sampled speculation accepts "
        f"{found.acceptance:.1%}; perplexity {found.perplexity:.2f}, the model's "
        f"{found.teacher_perplexity:.2f}"
    )


@train_command.command("exits", short_help="Heads that answer after some of the layers.")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The .safetensors file, for convert --exits.")
@click.option("--layers", help="After how many layers, e.g. 3,5. [default: about 1/3 and 2/3 of them]")
@_training_options
def exits_command(model: Path, output: Path, layers: str | None, as_json: bool, **options: Any) -> None:
    """Train heads that say after some of MODEL's layers what all of them would; MODEL stays as it is."""
    require_libraries()
    from edgert.training.exits import choose_layers, train_exits

    teacher, corpus, run = _prepare(model, "exits", options)
    run = _with_rate(run, teacher.spec.width, options["rate"])
    chosen = choose_layers(teacher.spec, layers)
    with _Bar("exits") as report:
        found = train_exits(teacher, corpus, chosen, run, output, report)
    if as_json:
        print(json.dumps({layer: exit_.to_json() for layer, exit_ in found.items()}))
        return
    for layer, exit_ in found.items():
        print(f"exit after {layer} of {teacher.spec.layers} layers, {trust_text(exit_)}")
    print(f"{output}: convert the model again with --exits {output}")


@train_command.command("predictor", short_help="Which neurons will fire, so that others need not be read.")
@click.argument("model", type=FILE)
@click.option(
    "-o", "--output", type=FILE, required=True, help="The .safetensors file, for convert --predictor."
)
@click.option("--rank", type=int, help="Of a layer where as much fires as in the mean. [default: width / 8]")
@click.option(
    "--recall",
    type=float,
    default=0.95,
    show_default=True,
    help="Of the neurons that fire, the share to be found. What is missed changes what the model says.",
)
@click.option("--every-layer", is_flag=True, help="Also for layers in which it would not pay.")
@_training_options
def predictor_command(
    model: Path,
    output: Path,
    rank: int | None,
    recall: float,
    every_layer: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train low-rank predictors of the neurons that fire, for a MODEL with ReLU, which stays as it is."""
    require_libraries()
    from edgert.training.predictor import check_model, train_predictor

    teacher, corpus, run = _prepare(model, "predictor", options)
    check_model(teacher.spec)
    run = _with_rate(run, teacher.spec.width, options["rate"], _PREDICTOR_RATE)
    with _Bar("predictor") as report:
        ranks, found = train_predictor(teacher, corpus, rank, recall, every_layer, run, output, report)
    if as_json:
        print(json.dumps({"ranks": ranks, **found.to_json()}))
        return
    for layer, of in enumerate(ranks):
        shares = (found.predicted[layer], found.firing[layer], found.recall[layer])
        said = "expects {:.1%} of the neurons, {:.1%} fire, {:.1%} of these are expected".format(*shares)
        print(f"layer {layer}, " + (f"rank {of}: {said}" if of else "none: it would not pay"))
    print(f"{found.cost}")
    print(f"{output}: convert the model again with --predictor {output}")


def _prepare(folder: Path, kind: str, options: dict[str, Any]) -> "tuple[Teacher, Corpus, Run]":
    """The teacher, the text, and how to run, from what the command line says."""
    import torch

    from edgert.training.corpus import read_corpus
    from edgert.training.run import Run
    from edgert.training.teacher import load_teacher

    teacher = load_teacher(folder, options["device"], options["threads"])
    spec = teacher.spec
    tokens = options["row_tokens"] or min(512, spec.context)
    if not 8 <= tokens <= spec.context:
        raise UsageError(f"--row-tokens is {tokens}; expected 8 to the model's context of {spec.context}")
    corpus = read_corpus(
        options["text"],
        folder / "tokenizer.json",
        vocab=spec.vocab,
        eos=spec.eos_ids[0] if spec.eos_ids else None,
        held_out=options["held_out"],
        row_tokens=tokens,
        seed=options["seed"],
    )
    steps, minutes = options["steps"], options["minutes"]
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes is {minutes}; expected more than 0")
    if steps is None:
        steps = _DEFAULT_STEPS[kind] if minutes is None else 1 << 30
    half, compiled = options["half"], options["compiled"]
    if half is None:
        half = teacher.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if compiled is None:
        compiled = steps >= _LONG_STEPS and (teacher.device.type != "cpu" or shutil.which("g++") is not None)
    run = Run(steps, minutes, options["rows"], tokens, 0.0, options["seed"], half, compiled)
    return teacher, corpus, run


def _with_rate(run: "Run", width: int, rate: float | None, usual: float = 6e-3) -> "Run":
    if rate is not None and not 0 < rate < 1:
        raise UsageError(f"--rate is {rate}; expected a number between 0 and 1")
    # Wider matrices take smaller steps; 192 is the width the constant was chosen at.
    return dataclasses.replace(run, rate=rate or usual * min(1.0, (192 / width) ** 0.5))


class _Bar:
    """A progress bar on stderr where that is a terminal, else a line every hundred steps."""

    def __init__(self, what: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._console = Console(stderr=True)
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task, self._what = self._bar.add_task(what, total=1.0), what

    def __enter__(self) -> "Report":
        self._bar.start()
        return self._report

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt:
            _say("stopped; the same command goes on from the last checkpoint")

    def _report(self, step: int, done: float, loss: float) -> None:
        text = f"{self._what} step {step}, {loss:.4f} nats from the model"
        self._bar.update(self._task, description=text, completed=done)
        if not self._console.is_terminal and step % 100 == 0:
            _say(f"{text}, {done:.0%}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
