"""`edgert convert`, `edgert inspect` and `edgert verify`."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from edgert.calibration import convert, sparsity_cost
from edgert.calibration.inputs import WAYS
from edgert.calibration.verify import check_source, verify_conversion
from edgert.cli.options import FILE, size_text, trust_text
from edgert.config import DOWN, LEFT_OUT, QUANTS, Quant, QuantSpec
from edgert.converters import ConversionReport, split
from edgert.converters.neurons import CORE, SPARSITIES, Sparsity
from edgert.errors import ConversionError, UsageError
from edgert.format import ErtFile
from edgert.format.exits import EXITS_KEY
from edgert.format.inputs import INPUTS_KEY, InputThresholds
from edgert.format.predictors import PREDICTORS_KEY, Predictors
from edgert.format.sparsity import SPARSITY_KEY, SparsityCalibration
from edgert.format.verify import check
from edgert.planner import BASE_BYTES, buffer_bytes, cache_bytes, plan


class SparsityType(click.ParamType[Sparsity]):
    """A word, or a share of zeros."""

    name = "sparsity"

    def convert(self, value: Sparsity, param: click.Parameter | None, ctx: click.Context | None) -> Sparsity:
        """The value of the option."""
        if value in SPARSITIES or str(value).startswith(tuple(f"{way}:" for way in (CORE, *WAYS))):
            return value
        try:
            return float(value)
        except ValueError:
            words = ", ".join(SPARSITIES)
            self.fail(
                f"{value!r}; expected one of {words}, or a share like 0.4, core:0.4, teal:0.4 or skip:0.2"
            )


@click.command("convert")
@click.argument("source")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT.ert",
    help="The file to write; two with --split: EDGE,CLOUD.",
)
@click.option(
    "--quant",
    type=click.Choice(QUANTS),
    help="Precision of matrices. [default: q4; of a GGUF file or ONNX model what it has, or q8 where "
    "that has no like]",
)
@click.option(
    "--split", "layer", type=int, metavar="LAYER", help="Write two halves, cut before this layer (hand-off)."
)
@click.option(
    "--exits",
    type=FILE,
    help="Exit heads of `edgert train exits`. [default: exits.safetensors in SOURCE, if any]",
)
@click.option(
    "--predictor",
    type=FILE,
    help="Predictors of `edgert train predictor`: gates of neurons that they expect to be silent are not "
    "read. Not exact; says what it costs.",
)
@click.option(
    "--calibrate",
    type=FILE,
    metavar="TEXT",
    help="Run the model over this text first (.txt or .jsonl) and round so that it loses least there.",
)
@click.option(
    "--bits",
    type=float,
    help="With --calibrate, instead of --quant: at most so many stored bits per weight of the whole file, "
    "each tensor and each expert in the type its measured share in the loss is worth.",
)
@click.option(
    "--embeddings",
    type=click.Choice(QUANTS),
    help="Precision of the token embedding, when it is to differ.",
)
@click.option(
    "--outliers",
    type=int,
    default=0,
    metavar="COLUMNS",
    help="With --calibrate: store so many columns of every matrix apart, in 8 bits, those that meet the "
    "largest activations; a multiple of 32.",
)
@click.option(
    "--sparsity",
    type=SparsityType(),
    default="auto",
    show_default=True,
    metavar="auto|exact|none|SHARE|core:SHARE|teal:SHARE|skip:SHARE",
    help="Store the feed-forward neuron by neuron, so that those that do not fire are not read: where many "
    "activations are exactly zero (ReLU, 512 wide or more), or an error where that cannot be, or never. A "
    "SHARE like 0.4 takes so many of the smallest activations for zero, core:SHARE goes on with so many of "
    "the neurons, those that the prompt used most, teal:SHARE takes inputs of all products for zero, "
    "so that such a share of the weights meets zeros, skip:SHARE leaves out so many of the feed-forwards, if "
    "they change that little: not exact, needs --calibrate, and says what it costs.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Of an ONNX model: run a sample text in onnxruntime too and compare the logits; exit status 1 if "
    "they differ by more than rounding.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, sizes and memory; write no model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def convert_command(
    source: str,
    output: str,
    quant: Quant | None,
    layer: int | None,
    exits: Path | None,
    predictor: Path | None,
    calibrate: Path | None,
    bits: float | None,
    embeddings: Quant | None,
    outliers: int,
    sparsity: Sparsity,
    verify: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert a Hugging Face model folder, a GGUF file or an ONNX model to one .ert file.

    SOURCE may also be a model's name on the Hugging Face Hub, as hf://ORG/NAME, hf://ORG/NAME@REVISION, or
    hf://ORG/NAME/FILE.gguf. A download that was cut goes on where it stopped, when the same is asked again;
    files are kept in HF_HOME; --dry-run fetches headers alone.

    With --split, SOURCE may be an .ert file, and two files are written: the layers before LAYER with the
    exits among them, for the board, and the rest, for `edgert cloud`.
    """
    outputs = output.split(",") if layer is not None else [output]
    if layer is not None and len(outputs) != 2:
        raise UsageError(f"-o is {output!r}; with --split expected two files: -o edge.ert,cloud.ert")
    if layer is not None and Path(source).suffix == ".ert" and (quant is not None or exits is not None):
        wrong = "--exits" if quant is None else "--quant"
        raise UsageError(f"{wrong} does not apply to an .ert file, whose tensors are copied as they are")
    if layer is not None and predictor is not None:
        raise UsageError("--predictor does not go with --split: convert to one .ert file and split that")
    if layer is not None and calibrate is not None:
        raise UsageError("--calibrate does not go with --split: calibrate one .ert file and split that")
    if layer is not None and (bits is not None or embeddings is not None or dry_run):
        raise UsageError("--bits, --embeddings and --dry-run do not go with --split: split the .ert file")
    if layer is not None and outliers:
        raise UsageError("--outliers does not go with --split: convert to one .ert file and split that")
    if verify:
        if layer is not None or dry_run:
            raise UsageError("--verify runs the converted model; it does not go with --split or --dry-run")
        check_source(Path(source))
    if embeddings is not None and quant is None and bits is None:
        raise UsageError("--embeddings says how one matrix is stored; give --quant or --bits for the others")
    types: Quant | QuantSpec | None = quant
    if embeddings is not None and quant is not None:
        types = QuantSpec(quant, embeddings)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def progress(name: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, description=name[-24:], completed=done_bytes, total=total_bytes)

        if layer is None:
            report = convert(
                source,
                output,
                types,
                progress,
                exits=exits,
                predictor=predictor,
                sparsity=sparsity,
                calibrate=calibrate,
                bits=bits,
                embedding=embeddings if bits is not None else None,
                outliers=outliers,
                dry_run=dry_run,
            )
            reports: tuple[ConversionReport, ...] = (report,)
        else:
            reports = split(
                source, layer, outputs[0], outputs[1], quant, progress, exits=exits, sparsity=sparsity
            )
    cost = None
    approximate = sparsity not in SPARSITIES or predictor is not None
    if approximate and layer is None and calibrate is not None and not dry_run:
        cost = sparsity_cost(Path(output), calibrate)
    verified = verify_conversion(Path(source), reports[0]) if verify else None
    if as_json:
        rows = [_report_json(report) for report in reports]
        if verified is not None:
            rows[0]["verification"] = dataclasses.asdict(verified) | {"passed": verified.passed}
        if cost is not None:
            rows[0]["perplexity"] = dataclasses.asdict(cost)
        print(json.dumps(rows if layer is not None else rows[0]))
    else:
        for report in reports:
            _print_report(report, dry_run)
        if verified is not None:
            print(verified)
    if verified is not None and not verified.passed:
        raise ConversionError(f"{output}: {verified}; report the source model, or do not use the file")
    if as_json:
        return
    if predictor is not None and not dry_run:
        with ErtFile.open(output) as opened:
            assert opened.predictors is not None
            print(f"gates are read where neurons are expected to fire: {opened.predictors.cost}")
    if cost is not None and isinstance(sparsity, float):
        print(f"{sparsity:.0%} of the activations taken for zero: {cost}")
    elif cost is not None:
        print(f"with {'what the predictors miss' if predictor else sparsity}: {cost}")


def _report_json(report: ConversionReport) -> dict[str, Any]:
    found = dataclasses.asdict(report) | {"path": str(report.path), "spec": report.spec.to_json()}
    return found | {"bits_per_weight": report.bits_per_weight}


def _print_report(report: ConversionReport, dry_run: bool) -> None:
    """A table of the tensors; without what only writing them tells, for a plan."""
    columns = ["tensor", "shape", "from", "type", "size", *([] if dry_run else ["error"])]
    table = Table(*columns, box=None, pad_edge=False)
    for column in range(4, len(columns)):
        table.columns[column].justify = "right"
    for tensor in report.tensors:
        shape = " x ".join(map(str, tensor.shape))
        size, error = size_text(tensor.nbytes), f"{tensor.relative_error:.2%}"
        row = [tensor.name, shape, tensor.source_type, tensor.quant, size, error]
        table.add_row(*row[: len(columns)])
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    size = f"{size_text(report.file_bytes)}, {report.bits_per_weight:.2f} bits per weight"
    if not dry_run:
        for line in _changes(report):
            print(line)
        print(f"{report.path}: {size}, {report.seconds:.1f} s")
        return
    print(f"{report.path} would be {size}; nothing was written")
    config = plan(report.spec, report.file_bytes)
    cache, buffers = cache_bytes(report.spec, config), buffer_bytes(report.spec, config)
    print(
        f"to run: {size_text(report.file_bytes)} of weights, {size_text(cache)} of cache for "
        f"{config.context} positions, {size_text(buffers)} of buffers, and {size_text(BASE_BYTES)} for "
        "Python and kernels"
    )


def _changes(report: ConversionReport) -> list[str]:
    """What became of each type of the source, and at what error."""
    errors: dict[tuple[str, str], list[float]] = {}
    for tensor in report.tensors:
        if tensor.source_type:
            errors.setdefault((tensor.source_type, tensor.quant), []).append(tensor.relative_error)
    return [
        f"{len(found):>5} tensors  {old:>8} -> {new:<4} "
        + ("exact" if max(found) == 0 else f"rounded, error up to {max(found):.2%}")
        for (old, new), found in errors.items()
    ]


def _print_sparsity(sparsity: SparsityCalibration) -> None:
    wanted = f"{sparsity.share:.0%} wanted" if sparsity.share else "by themselves"
    print(f"  zero activations, {wanted}; how often a neuron's is not exactly zero, least, quartiles, most:")
    for layer, zeros in enumerate(sparsity.zeros):
        often = " ".join(f"{share:6.1%}" for share in sparsity.firing[layer])
        below = f" below {sparsity.thresholds[layer]:.4g}" if sparsity.thresholds[layer] else ""
        print(f"    layer {layer:<3} {zeros:6.1%} zero{below}, neurons {often}")


def _print_predictors(predictors: Predictors, ranks: tuple[int, ...]) -> None:
    print(f"  predictors of firing neurons, {predictors.cost}")
    for layer, rank in enumerate(ranks):
        shares = (predictors.predicted[layer], predictors.firing[layer], predictors.recall[layer])
        said = "expects {:.1%} of the neurons, {:.1%} fire, {:.1%} of these are expected".format(*shares)
        print(f"    layer {layer:<3} " + (f"rank {rank}, {said}" if rank else "none: it would not pay"))


def _print_inputs(inputs: InputThresholds) -> None:
    print(
        f"  inputs taken for zero, {inputs.share:.0%} wanted of what weights meet; q k v, o, gate up, down:"
    )
    for layer, zeros in enumerate(inputs.zeros):
        out = ", feed-forward left out" if inputs.thresholds[layer][DOWN] >= LEFT_OUT else ""
        print(f"    layer {layer:<3} " + " ".join(f"{share:6.1%}" for share in zeros) + out)


@click.command("inspect")
@click.argument("file", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(file: Path, as_json: bool) -> None:
    """Show what is inside an .ert file."""
    with ErtFile.open(file) as opened:
        spec, metadata, size = opened.spec.to_json(), opened.metadata, opened.size
        tensors, exits, sparsity = list(opened.tensors.values()), opened.exits, opened.sparsity
        predictors, ranks, inputs = opened.predictors, opened.spec.predictors, opened.inputs
    if as_json:
        rows = [dataclasses.asdict(t) for t in tensors]
        heads = {layer: calibration.to_json() for layer, calibration in exits.items()}
        found = {"size_bytes": size, "spec": spec, "metadata": metadata, "exits": heads, "tensors": rows}
        found["sparsity"] = sparsity and sparsity.to_json()
        found["predictors"] = predictors and predictors.to_json()
        found["inputs"] = inputs and inputs.to_json()
        print(json.dumps(found))
        return
    print(f"{file}: {size_text(size)}, {len(tensors)} tensors")
    for name, value in spec.items():
        print(f"  {name:<16} {value}")
    for name, text in metadata.items():
        if name in (EXITS_KEY, SPARSITY_KEY, PREDICTORS_KEY, INPUTS_KEY):
            continue  # shown below, for people
        line = " ".join(text.split())
        print(f"  {name:<16} {line if len(line) <= 70 else line[:67] + '...'}")
    for layer, exit_ in exits.items():
        print(f"  exit after {layer} layers, {trust_text(exit_)}")
    if sparsity is not None:
        _print_sparsity(sparsity)
    if predictors is not None:
        _print_predictors(predictors, ranks)
    if spec.get("core"):
        print(f"  cores, {spec['core']:.0%} of the neurons: behind a prompt only those that it used most")
    if inputs is not None:
        _print_inputs(inputs)
    for t in tensors:
        shape = " x ".join(map(str, t.shape))
        print(f"  {t.name:<28} {shape:<16} {t.quant:<4} {size_text(t.nbytes):>12}")


@click.command("verify")
@click.argument("file", type=FILE)
def verify_command(file: Path) -> None:
    """Check every checksum of an .ert file; exit status 1 on damage."""
    print(f"{file}: all {check(file)} tensors are intact")
