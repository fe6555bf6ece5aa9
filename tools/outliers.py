"""What it gives to store outliers apart: single weights (SqueezeLLM), or columns (LLM.int8()).

    python tools/outliers.py weights MODEL... --text TEXT     sparse weights, at equal bits beside --bits
    python tools/outliers.py columns MODEL... --text TEXT     `edgert convert --outliers`, on planted features
    python tools/outliers.py layer                            one wide layer, error against bits

MODEL is a Hugging Face folder, TEXT a .jsonl whose last documents are scored and whose others calibrate.

`weights`: of every row the weights whose rounding costs most (their squared error, weighed by what they meet)
are kept in float16 at 32 bits each, a column and a value, while the others are rounded as a calibration
does (Kim et al., 2023, arXiv:2306.07629, section 4.2, with GPTQ under it). Nothing is stored: the perplexity
is that of the values, with float32 activations.

`columns`: features of the normed rows are made --times larger and the columns that meet them as much smaller,
which is the same model, with the outlier features that LLM.int8() found in large ones; files are scored as
they run.

`layer`: Gaussian weights 2048 wide and rows some of whose features are larger; the squared error of the
product, relative to it, with activations in 8 bits as kernels take them.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import edgert
from edgert import converters
from edgert.calibration.convert import assignment
from edgert.calibration.sensitivity import Sensitivity
from edgert.config import Quant, QuantSpec
from edgert.converters.compensate import Errors, compensated
from edgert.converters.quantize import SEARCHES, quantize
from edgert.evaluate import read_documents
from edgert.format import ErtFile
from edgert.kernels import packing
from edgert.kernels.packing import GROUP
from edgert.kernels.reference.rounding import search_groups

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.quality_curve import CALIBRATED, Kept, matrices, score

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

BITS: dict[Quant, float] = {"q8": 8.5, "q4m": 5.0, "q4": 4.5, "q4s": 4.25, "q3": 3.25, "q2": 2.25}
SPARSE_BITS = 32  # of a weight apart: 16 of its column and 16 of its value
SHARES = (0.0, 0.005, 0.01, 0.02)
"""Of the weights of a row; 0.0045 is what SqueezeLLM recommends."""
FEATURES = 4
COLUMNS = 32


@dataclass(frozen=True, slots=True)
class Setting:
    """A model and the two halves of a text, in a folder of their own."""

    folder: Path
    text: Path
    documents: list[str]
    scratch: Path


@contextmanager
def setting(model: Path, text: Path, last: int) -> Iterator[Setting]:
    """A copy of the model without exits, beside the text that calibrates."""
    documents = read_documents(text)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder, others = scratch / model.name, scratch / text.name
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("exits.safetensors"))
        others.write_text("\n".join(json.dumps({"text": d}) for d in documents[:-last]))
        yield Setting(folder, others, documents[-last:], scratch)


def costly(weights: Floats, errors: Errors, quant: Quant, count: int) -> Mask:
    """Of each row the `count` weights that are worth most apart, found in two rounds."""
    mask = np.zeros(weights.shape, bool)
    for _ in range(2 if count else 0):
        rest = np.where(mask, np.float32(0), weights)
        left = (rest - quantize(rest, quant, errors.weight).floats()) ** 2 * errors.weight
        # What is apart already stays so, unless another's error is ten times all of it.
        left = np.where(mask, 10 * weights**2 * errors.weight, left)
        chosen = np.argpartition(-left, count - 1, axis=1)[:, :count]
        mask = np.zeros(weights.shape, bool)
        np.put_along_axis(mask, chosen, True, axis=1)
    return mask


def sparse(weights: Floats, errors: Errors, quant: Quant, mask: Mask) -> Floats:
    """`compensated`, with the weights under the mask in float16, and what that gives."""
    left = np.ascontiguousarray(weights.T)
    apart, out = mask.T, np.empty_like(left)
    for start in range(0, len(left), GROUP):
        end = min(start + GROUP, len(left))
        block, answer = left[start:end], errors.answer[start:end]
        keep = (~apart[start:end]).astype(np.float32)
        weight = np.maximum(errors.weight[start:end, None] * keep, 1e-12)
        scale, least = np.empty((2, block.shape[1]), np.float32)
        search_groups(*SEARCHES[quant], block * keep, weight, scale, least)  # the twin: a weight for each
        low, high = SEARCHES[quant].low, SEARCHES[quant].high
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        made = np.empty_like(block)
        for j, column in enumerate(block):
            rounded = np.clip(np.rint((column - least) * inverse), low, high) * scale + least
            exact = column.astype(np.float16).astype(np.float32)
            out[start + j] = np.where(apart[start + j], exact, rounded)
            made[j] = (column - out[start + j]) / answer[j, start + j]
            block[j + 1 :] -= answer[j, start + j + 1 : end, None] * made[j]
        left[end:] -= answer[:, end:].T @ made
    return np.ascontiguousarray(out.T)


def weights_apart(s: Setting, types: tuple[Quant, ...]) -> None:
    """Rows of the table: perplexity by type and share."""
    exact = s.scratch / "exact.ert"
    converters.convert(s.folder, exact, "f32", sparsity="none")
    with ErtFile.open(exact) as file:
        kept, data = Kept(file, s.text), np.array(file.data)
        places = list(matrices(file))
    for quant in types:
        for share in SHARES:
            bits = size = 0.0
            for name, at, rows, columns in places:
                n, k = packing.padded(rows, columns)
                with ErtFile.open(exact) as file:
                    whole = packing.unpack("f32", file.data[at : at + n * k * 4], rows, columns)
                gram = kept.gram(name)
                if gram is None:
                    found, own = quantize(whole, "q8").floats(), BITS["q8"]
                else:
                    errors, count = Errors(gram), max(1, round(share * columns)) if share else 0
                    found = sparse(whole, errors, quant, costly(whole, errors, quant, count))
                    own = BITS[quant] + SPARSE_BITS * count / columns
                bits, size = bits + own * whole.size, size + whole.size
                packed = packing.pack_floats(found).reshape(-1)
                data[at : at + packed.size] = packed
            changed = s.scratch / "changed.ert"
            changed.write_bytes(data.tobytes())
            row = (s.folder.name, quant, f"{share:.1%}", f"{bits / size:.2f}")
            print("|", " | ".join(row), f"| {score(changed, s.documents):.3f} |", flush=True)


def plant(folder: Path, times: float) -> None:
    """Make some features of the rows that q, k, v, gate and up meet larger, and their columns smaller."""
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    features = np.random.default_rng(0).permutation(width)[:FEATURES]
    (path,) = folder.glob("*.safetensors")
    tensors = {name: values.astype(np.float32) for name, values in load_file(path).items()}
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[features] *= times
        elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            values[:, features] /= times
    save_file(tensors, path)


def columns_apart(s: Setting, types: tuple[Quant, ...], times: float) -> None:
    """Rows of the table: each type without and with outlier columns, and --bits at the size of these."""
    plant(s.folder, times)
    out, reference = s.scratch / "out.ert", s.scratch / "q8.ert"
    converters.convert(s.folder, out, "f32", sparsity="none")
    print(f"| {s.folder.name} x {times:g} | f32 | 32.00 | {score(out, s.documents):.3f} |", flush=True)
    converters.convert(s.folder, reference, "q8", sparsity="none")
    with ErtFile.open(out) as file:
        kept = Kept(file, s.text)
    with ErtFile.open(reference) as file, closing(Sensitivity(file, kept.config, kept.text.windows)) as m:
        losses = m.losses(kept)
        for quant in types:
            for count in (0, COLUMNS):
                report = converters.convert(
                    s.folder, out, quant, sparsity="none", outliers=count, calibration=kept
                )
                what = f"{quant}, {count} columns apart" if count else quant
                own = f"{report.bits_per_weight:.2f} | {score(out, s.documents):.3f}"
                print(f"| {s.folder.name} x {times:g} | {what} | {own} |", flush=True)
            each = QuantSpec(each=assignment(file, losses, report.bits_per_weight))
            report = converters.convert(s.folder, out, each, sparsity="none", calibration=kept)
            own = f"{report.bits_per_weight:.2f} | {score(out, s.documents):.3f}"
            print(f"| {s.folder.name} x {times:g} | --bits, as many | {own} |", flush=True)


def rounded(x: Floats) -> Floats:
    """Rows as kernels take them: int8 in groups of 32 with a scale each."""
    groups = x.reshape(len(x), -1, GROUP)
    scale = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    whole: Floats = np.rint(groups / np.where(scale > 0, scale, 1)) * scale
    return whole.reshape(x.shape)


def layer() -> None:
    """Rows of the table: the error of one matrix by what is apart."""
    rng, width, rows = np.random.default_rng(0), 2048, 256
    weights = rng.standard_normal((rows, width)).astype(np.float32)
    features = rng.permutation(width)[:6]
    for times in (1.0, 20.0):
        x = rng.standard_normal((4096, width)).astype(np.float32)
        x[:, features] *= times
        gram = x.T @ x / np.float32(len(x))
        apart = np.sort(np.argsort(-np.diag(gram))[:COLUMNS])
        rest, without, x_without = gram.copy(), weights.copy(), x.copy()
        rest[apart], rest[:, apart], without[:, apart], x_without[:, apart] = 0, 0, 0, 0
        own = rounded(x[:, apart]) @ quantize(weights[:, apart], "q8").floats().T
        exact, x_rounded, x_without = x @ weights.T, rounded(x), rounded(x_without)
        whole, others = Errors(gram), Errors(rest)
        for quant in CALIBRATED:
            plain = x_rounded @ compensated(weights, whole, quant).floats().T
            split = x_without @ compensated(without, others, quant).floats().T + own
            single = x_rounded @ sparse(weights, whole, quant, costly(weights, whole, quant, 9)).T
            for what, found, more in (
                (quant, plain, 0.0),
                (f"{quant}, {COLUMNS} columns apart", split, BITS["q8"] * COLUMNS / width),
                (f"{quant}, 9 weights of a row apart", single, SPARSE_BITS * 9 / width),
            ):
                error = float(np.square(found - exact).sum() / np.square(exact).sum())
                print(f"| {times:g} | {what} | {BITS[quant] + more:.2f} | {error:.5f} |", flush=True)


def main() -> None:
    """Print one of the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("weights", "columns", "layer"))
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--last", type=int, default=200, help="documents scored")
    parser.add_argument("--types", default="q4s,q3,q2")
    parser.add_argument("--times", type=float, default=20.0, help="how large planted features are")
    options = parser.parse_args()
    if options.what == "layer":
        layer()
        return
    types: tuple[Quant, ...] = tuple(options.types.split(","))
    for model in options.models:
        with setting(model, options.text, options.last) as s:
            if options.what == "weights":
                weights_apart(s, types)
            else:
                columns_apart(s, types, options.times)


if __name__ == "__main__":
    try:
        main()
    except edgert.EdgertError as error:
        sys.exit(f"outliers.py: {error}")
