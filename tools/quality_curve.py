"""Perplexity against bits per weight: edgert's types and budgets beside llama.cpp's, of the same weights.

    python tools/quality_curve.py MODEL... --text TEXT --peer PYTHON -o quality.json --plot quality.svg

MODEL is a Hugging Face folder. The last documents of TEXT, a .jsonl, are scored, the others calibrate. PYTHON
is an interpreter with llama-cpp-python, gguf and matplotlib: llama.cpp's types are rounded by its own code
(ggml_round.py), plain and with an importance matrix from the same calibration, the embedding in Q6_K as
llama.cpp keeps it, and scored with exact float32 activations, while edgert's files are scored as they run. No
figure is a timing. What OUTPUT holds of other models stays; without a MODEL it is only drawn anew.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgert
from edgert import converters
from edgert.calibration import TextCalibration
from edgert.calibration.convert import assignment
from edgert.calibration.sensitivity import Sensitivity
from edgert.config import Quant, QuantSpec
from edgert.converters import ConversionReport
from edgert.evaluate import evaluate, read_documents
from edgert.format import ErtFile
from edgert.format.tensors import matrices_in
from edgert.kernels import packing

Floats = NDArray[np.float32]

TYPES: tuple[Quant, ...] = ("q8", "q4m", "q4", "q4s", "q3", "q2")
CALIBRATED: tuple[Quant, ...] = ("q4m", "q4", "q4s", "q3", "q2")
BUDGETS = (2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
THEIRS = {"Q4_0": 4.5, "Q4_K": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625}  # bits per weight
EMBEDDING, EMBEDDING_BITS = "Q6_K", 6.5625
ROUND = Path(__file__).with_name("ggml_round.py")
PLOT = Path(__file__).with_name("quality_plot.py")


@dataclass(frozen=True, slots=True)
class Point:
    """One file, or what one would be."""

    model: str
    series: str
    name: str
    bits: float  # of all tensors, per weight
    perplexity: float


def score(path: Path, documents: list[str]) -> float:
    """Perplexity per token."""
    with edgert.load(path) as model:
        return evaluate(model, documents).perplexity


class Kept:
    """A calibration of a small model, made once for all its conversions."""

    zeros_wanted = 0.0

    def __init__(self, file: ErtFile, text: Path) -> None:
        self._grams: dict[str, Floats | None] = {}
        self._rows: dict[str, int] = {}
        with closing(TextCalibration(file, text)) as found:
            self.metadata, self.config, self.text = found.metadata, found.config, found.text
            names = [name for t in file.tensors.values() for name, _, _ in matrices_in(t)]
            for name in sorted(names, key=lambda n: n == "token_embedding"):
                self._grams[name], self._rows[name] = found.gram(name), found.rows(name)
            self._uses = found.expert_uses()

    def gram(self, name: str) -> Floats | None:
        """See Calibration."""
        return self._grams[name]

    def rows(self, name: str) -> int:
        """See TextCalibration."""
        return self._rows[name]

    def firing(self, layer: int) -> None:
        """Neurons are not reordered here."""

    def expert_uses(self) -> Any:
        """See Calibration."""
        return self._uses


def ours(
    folder: Path, scratch: Path, kept: Kept, documents: list[str], sizes: Iterable[float]
) -> Iterator[Point]:
    """Every type plain and calibrated, and mixed under budgets: ours, of one type for all, and `sizes`."""
    out, reference = scratch / "ours.ert", scratch / "q8.ert"
    converters.convert(folder, reference, "q8", sparsity="none")
    made: list[tuple[str, str, Quant | QuantSpec, Kept | None]] = [
        *(("plain", quant, quant, None) for quant in TYPES),
        *(("calibrated", quant, quant, kept) for quant in CALIBRATED),
    ]
    with ErtFile.open(reference) as file:
        with closing(Sensitivity(file, kept.config, kept.text.windows)) as measured:
            losses = measured.losses(kept)
        same = [plan.bits_per_weight for plan in plans(folder, out)]
        for bits in sorted({*BUDGETS, *same, *sizes}):
            try:
                each = assignment(file, losses, bits)
            except edgert.EdgertError as error:  # padding and norms alone may take that much of a tiny model
                print(f"{folder.name} --bits {bits}: {error}")
                continue
            made.append(("--bits", f"{bits:.4g}", QuantSpec(each=each), kept))
    for series, what, quant, calibration in made:
        try:
            report = converters.convert(folder, out, quant, sparsity="none", calibration=calibration)
        except edgert.EdgertError as error:  # q4m, where rows end inside a group
            print(f"{folder.name} {what}: {error}")
            continue
        yield Point(folder.name, f"edgert, {series}", what, report.bits_per_weight, score(out, documents))


def matrices(file: ErtFile) -> Iterator[tuple[str, int, int, int]]:
    """Name, byte, rows and columns of every matrix of an f32 file that llama.cpp would round."""
    for tensor in file.tensors.values():
        if tensor.role not in ("matrix", "expert"):
            continue
        at = tensor.offset
        for name, rows, columns in matrices_in(tensor):
            yield name, at, rows, columns
            n, k = packing.padded(rows, columns)
            at += n * k * 4


def plans(folder: Path, out: Path) -> list[ConversionReport]:
    """What files of one type for all would be."""
    return [converters.convert(folder, out, q, sparsity="none", dry_run=True) for q in ("q4", "q3")]


def theirs(folder: Path, scratch: Path, kept: Kept, documents: list[str], peer: str) -> Iterator[Point]:
    """llama.cpp's types: their values in a float32 file of ours."""
    exact = scratch / "exact.ert"
    yield Point(folder.name, "float32", "f32", 32.0, score(exact, documents))
    given: dict[str, Any] = {}
    importance: dict[str, Any] = {}
    with ErtFile.open(exact) as file:
        data = np.array(file.data)
        places = list(matrices(file))
        for name, at, rows, columns in places:
            n, k = packing.padded(rows, columns)
            given[name] = packing.unpack("f32", data[at : at + n * k * 4], rows, columns)
            gram = kept.gram(name)
            if gram is not None:
                importance[f"{name} importance"] = np.diag(gram).astype(np.float32)
        rest = sum(t.nbytes for t in file.tensors.values() if t.role in ("vector", "router"))
        rest -= file.tensors["rope_frequencies"].nbytes
    weights = sum(found.size for found in given.values())
    types = {f"{n} type": EMBEDDING for n in ("token_embedding", "output") if n in given}
    large = sum(given[n].size for n in ("token_embedding", "output") if n in given)
    for kind, bits in THEIRS.items():
        size = bits * (weights - large) + EMBEDDING_BITS * large + 8 * rest
        for series, more in (("plain", {}), ("importance matrix", importance)):
            source, target = scratch / "in.npz", scratch / "out.npz"
            np.savez(source, **(given | types | more))
            subprocess.run([peer, str(ROUND), str(source), str(target), kind], check=True)
            found = np.load(target)
            for name, at, _, _ in places:
                packed = packing.pack_floats(found[name]).reshape(-1)
                data[at : at + packed.size] = packed
            changed = scratch / "theirs.ert"
            changed.write_bytes(data.tobytes())
            bits_per_weight = size / (weights + rest // 4)
            yield Point(folder.name, f"llama.cpp, {series}", kind, bits_per_weight, score(changed, documents))


def table(points: list[Point]) -> str:
    """Markdown, a row for each point."""
    lines = ["| model | | | bits per weight | perplexity |", "|---|---|---|---|---|"]
    for p in sorted(points, key=lambda p: (p.model, p.series, -p.bits)):
        lines.append(f"| {p.model} | {p.series} | {p.name} | {p.bits:.2f} | {p.perplexity:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all models, keeping what is there after each point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="none: only draw what OUTPUT holds")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--last", type=int, default=200, help="documents scored")
    parser.add_argument("--peer", required=True, help="an interpreter with the extra `peers`")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.plot:  # where matplotlib is missing, say so before an hour of measuring
        subprocess.run([options.peer, "-c", "import matplotlib"], check=True)
    documents = read_documents(options.text)
    points: list[Point] = []
    if options.output.is_file():  # what was measured of other models stays
        measured = {model.name for model in options.models}
        kept_points = json.loads(options.output.read_text())["points"]
        points = [Point(**p) for p in kept_points if p["model"] not in measured]
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            text = scratch / options.text.name
            lines = (json.dumps({"text": d}) for d in documents[: -options.last])
            text.write_text("\n".join(lines))
            folder = scratch / model.name
            shutil.copytree(model, folder, ignore=shutil.ignore_patterns("exits.safetensors"))
            held_out = documents[-options.last :]
            exact = scratch / "exact.ert"
            converters.convert(folder, exact, "f32", sparsity="none")
            with ErtFile.open(exact) as file:
                kept = Kept(file, text)
            sizes = (p.bits for p in points if p.model == model.name and "llama" in p.series)  # by then
            for found in (
                theirs(folder, scratch, kept, held_out, options.peer),
                ours(folder, scratch, kept, held_out, sizes),
            ):
                for point in found:
                    points.append(point)
                    print(
                        f"{point.model} {point.series} {point.name}: {point.bits:.3f} {point.perplexity:.4f}",
                        flush=True,
                    )
                    record = {
                        "text": options.text.name,
                        "documents": options.last,
                        "points": [asdict(p) for p in points],
                    }
                    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(points))
    if options.plot:
        subprocess.run([options.peer, str(PLOT), str(options.output), str(options.plot)], check=True)


if __name__ == "__main__":
    main()
