"""`edgert bench` and `edgert eval`."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click

from edgert.bench import BenchRow, run_tests, token_time
from edgert.bench_draft import draft_rows
from edgert.cli.options import FILE, engine_options, size_text, sparsity_option
from edgert.config import QUANTS, Quant
from edgert.engine import Engine
from edgert.errors import UsageError
from edgert.evaluate import evaluate, read_documents
from edgert.format import ErtFile
from edgert.model.shapes import SHAPES, parameters, planned, random_weights, shape
from edgert.planner import plan, require_memory
from edgert.resident import peak_rss_bytes
from edgert.runtime import load
from edgert.state import MAX_OUTPUTS, Weights


@click.command("bench")
@click.argument("file", type=FILE, required=False)
@click.option(
    "--shape", "shape_name", metavar="NAME", help=f"Random weights in a shape: {', '.join(SHAPES)}."
)
@click.option("--quant", type=click.Choice(QUANTS), help="Precision of a --shape. [default: q4]")
@click.option(
    "-p", "--prompt", type=int, help="Prompt tokens; 0: no such test. [default: 512; with --draft 32]"
)
@click.option("-n", "--generate", type=int, default=128, show_default=True, help="Generated tokens; 0: none.")
@click.option("-d", "--depth", type=int, default=0, show_default=True, help="Tokens already in the context.")
@click.option(
    "--rows",
    metavar="N,N,...",
    default="",
    help="Also time forwards of so many rows with their logits (fwN).",
)
@click.option("--profile", is_flag=True, help="Also say where a token's time and the memory go.")
@click.option("-r", "--repeats", type=int, default=5, show_default=True, help="Timed runs of each test.")
@click.option(
    "-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="How to print."
)
@click.option(
    "--draft", multiple=True, metavar="FILE|lookup|exit|auto", help="Compare generation with and without it."
)
@click.option("--tree", type=int, metavar="N", help="Most guesses checked at once. [default: 32]")
@click.option("--always", is_flag=True, help="With --draft: guess at every step, whether it pays or not.")
@click.option(
    "--text", "text_file", type=FILE, help="With --draft: a text whose documents begin the prompts."
)
@click.option("--last", type=int, help="With --text: only the last so many documents.")
@engine_options
def bench_command(
    file: Path | None,
    shape_name: str | None,
    quant: Quant | None,
    prompt: int | None,
    generate: int,
    depth: int,
    rows: str,
    profile: bool,
    repeats: int,
    output: str,
    draft: tuple[str, ...],
    tree: int | None,
    always: bool,
    text_file: Path | None,
    last: int | None,
    **options: Any,
) -> None:
    """Time prompt processing (pp) and generation (tg), with the columns of llama-bench.

    With --draft: generation alone, on real prompts, plain and guessing by turns.
    """
    if draft:
        if file is None or text_file is None:
            raise UsageError("--draft guesses at real text: give a FILE and a --text to take prompts from")
        if depth or rows or profile or min(repeats, generate) < 1:
            raise UsageError(
                "with --draft, -n and -r must be at least 1, and -d, --rows and --profile are not used"
            )
        texts = read_documents(text_file, last)
        _show(draft_rows(file, draft, texts, prompt or 32, generate, repeats, tree, always, options), output)
        return
    if tree is not None or always or text_file is not None or last is not None:
        raise UsageError("--tree, --always, --text and --last belong to --draft; give one as well")
    prompt = 512 if prompt is None else prompt
    if (file is None) == (shape_name is None):
        raise UsageError("give either a FILE or a --shape NAME")
    if file is not None and quant is not None:
        raise UsageError("--quant applies to --shape; a FILE has its own precision")
    if repeats < 1 or min(prompt, generate, depth) < 0:
        raise UsageError("-r must be at least 1, and -p, -n and -d not negative")
    counts = _row_counts(rows)
    if not prompt and not generate and not counts and not profile:
        raise UsageError("-p and -n are both 0: there is nothing to time; give one of them")
    results: list[BenchRow] = []
    wanted = depth + max(prompt, generate, *counts, _PROFILED + 1 if profile else 0)
    given = options.pop("context")
    with _weights(file, shape_name, quant or "q4") as (name, weights):
        context = min(wanted, weights.spec.context) if given is None else given
        config = plan(weights.spec, weights.size, context=context, **options)
        with closing(Engine(weights, config)) as engine:
            if profile:  # first: the peak of memory is then that of loading and of this
                print(_profile(engine, weights.size), file=sys.stderr)
            for test, mean, deviation in run_tests(engine, prompt, generate, repeats, depth, counts):
                count = parameters(weights.spec)
                results.append(BenchRow(name, weights.size, count, config.threads, test, mean, deviation))
    _show(results, output)


def _show(found: Iterable[BenchRow], output: str) -> None:
    rows = list(found)
    print(_markdown(rows) if output == "md" else json.dumps([dataclasses.asdict(row) for row in rows]))


_PROFILED = 64
"""Tokens of --profile."""


def _row_counts(text: str) -> list[int]:
    """The numbers of --rows."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if any(not part.isdecimal() or not 1 <= int(part) <= MAX_OUTPUTS for part in parts):
        raise UsageError(f"--rows is {text!r}; expected numbers from 1 to {MAX_OUTPUTS}, as in 1,2,4,8")
    return [int(part) for part in parts]


def _profile(engine: Engine, weights: int) -> str:
    seconds, outside = token_time(engine, min(_PROFILED, engine.forward.config.context - 1))
    peak, cache = peak_rss_bytes(), engine.forward.cache.data.nbytes
    return (
        f"a token with greedy sampling takes {seconds * 1e3:.3f} ms, {outside:.2%} of it outside kernels; "
        f"peak memory {size_text(peak)}: weights {size_text(weights)}, cache {size_text(cache)}, all else "
        f"{size_text(max(0, peak - weights - cache))}"
    )


@contextmanager
def _weights(file: Path | None, shape_name: str | None, quant: Quant) -> Iterator[tuple[str, Weights]]:
    if file is not None:
        with ErtFile.open(file) as opened:
            yield f"{opened.spec.architecture} {file.stem}", Weights.of_file(opened)
        return
    spec = shape(shape_name or "")
    size = planned(spec, quant)[1]
    require_memory(size, f"the shape {shape_name} {quant}")
    print(f"random weights, {shape_name} {quant}: {size_text(size)}", file=sys.stderr)
    yield f"{shape_name} {quant} random", random_weights(spec, quant)


def _markdown(rows: Sequence[BenchRow]) -> str:
    head = ("model", "size", "params", "threads", "test", "t/s")
    lines = [
        (
            row.model,
            size_text(row.size_bytes),
            f"{row.params / 1e6:.2f} M" if row.params < 1e9 else f"{row.params / 1e9:.2f} B",
            str(row.threads),
            row.test,
            f"{row.ts_mean:.2f} ± {row.ts_sd:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    rule = ["-" * (w - (i > 1)) + ":" * (i > 1) for i, w in enumerate(widths)]
    table = [head, rule, *lines]
    return "\n".join(
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) + " |" for r in table
    )


@click.command("eval")
@click.argument("file", type=FILE)
@click.option("--text", "text_file", type=FILE, required=True, help='A text, or .jsonl of {"text": ...}.')
@click.option("--last", type=int, help="Only the last so many documents.")
@click.option(
    "--prompt",
    type=int,
    default=1,
    help="Tokens at the start of each document that are given, not predicted: for a file with cores, the "
    "prompt that these are of. [default: 1]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
@sparsity_option
def eval_command(
    file: Path, text_file: Path, last: int | None, prompt: int, as_json: bool, **options: Any
) -> None:
    """Perplexity and bits per byte of a model on a text."""
    for name, value in (("--last", last), ("--prompt", prompt)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected at least 1")
    documents = read_documents(text_file, last)
    with load(file, **options) as model:
        result = evaluate(model, documents, _progress if sys.stderr.isatty() else None, prompt)
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"perplexity {result.perplexity:.4f}, {result.bits_per_byte:.4f} bits per byte "
        f"({result.tokens} tokens, {result.bytes} bytes, {result.documents} documents)"
    )


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
