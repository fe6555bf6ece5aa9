"""`edgert demo`: the bundled model through everything there is, in under a minute."""

import sys
import tempfile
import time
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

import click

from edgert.cli.options import size_text
from edgert.config import Quant
from edgert.converters import convert
from edgert.planner import cores
from edgert.runtime import Model, load

PROMPT = "Once upon a time"
_TOKENS = 120


@click.command("demo")
@click.option(
    "-p", "--prompt", default=PROMPT, show_default=True, metavar="TEXT", help="How the story begins."
)
def demo_command(prompt: str) -> None:
    """Convert the bundled story model and let it write, in every precision and thread count."""
    with bundled_model() as folder, tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "stories-q4.ert"
        print(f"The bundled model, {folder.name}, converted to our own format and run.")
        began = time.perf_counter()
        report = convert(folder, first, "q4")
        print(
            f"convert  {report.parameters / 1e6:.2f} M weights to {size_text(report.file_bytes)} at "
            f"{report.bits_per_weight:.2f} bits per weight, {time.perf_counter() - began:.1f} s"
        )
        began = time.perf_counter()
        with load(first, threads=1) as model:
            model.generate(prompt, max_tokens=1)
            seconds = time.perf_counter() - began
            print(f"start    {seconds:.1f} s (compiles the kernels where they are not cached)\n")
            _tell(model, prompt)
        _compare(folder, Path(scratch), prompt)


def bundled_model() -> AbstractContextManager[Path]:
    """The folder of the model that comes with edgert, as Hugging Face lays it out."""
    return resources.as_file(resources.files("edgert") / "assets" / "stories")


def _tell(model: Model, prompt: str) -> None:
    print(prompt, end="")
    for event in model.stream(prompt, max_tokens=_TOKENS):
        print(event.text, end="", flush=True)
    print("\n")
    sys.stdout.flush()


def _compare(folder: Path, scratch: Path, prompt: str) -> None:
    """The same story in every precision and on every thread count: speed, and whether it is the same."""
    print(f"{'weights':<8} {'size':>10} {'threads':>8} {'tokens/s':>9}  tokens equal to one thread's")
    quants: tuple[Quant, ...] = ("f32", "f16", "q8", "q4")
    for quant in quants:
        path = scratch / f"stories-{quant}.ert"
        size = convert(folder, path, quant).file_bytes
        alone: tuple[int, ...] = ()
        for threads in sorted({1, cores()}):
            with load(path, threads=threads) as model:
                done = model.generate(prompt, max_tokens=_TOKENS)
            alone = alone or done.tokens
            same = "" if threads == 1 else ("yes" if done.tokens == alone else "NO")
            rate = done.timings.decode_tok_s
            print(f"{quant:<8} {size_text(size):>10} {threads:>8} {rate:>9.0f}  {same}")
