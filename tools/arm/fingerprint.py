"""Print what edgert computes here, as hashes: one line per model, precision, cache and thread count.

Every line but the one that starts with '#' must be the same on every machine. The models are
tiny random ones of `tests/tiny_models.py`, which differ in rope, head sharing, odd sizes and
windows, and the bundled ones.
"""

import hashlib
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import llvmlite
import numba
import numpy as np

import edgert
from edgert.config import KV_TYPES, QUANTS, KvType, Quant
from edgert.converters.neurons import Sparsity
from edgert.kernels import target

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import tiny_models

NAMES = ("llama_rope_llama3", "qwen3_mqa_odd_sizes", "mistral_window_yarn_factor")
QUANTS_OF_ANY_WIDTH = tuple(quant for quant in QUANTS if quant != "q4m")
BUNDLED: tuple[tuple[str, Quant, Sparsity], ...] = (
    ("target", "q4", "none"),
    ("target", "q4", "exact"),  # neuron by neuron
    ("target", "q4m", "none"),
    ("moe", "q4", "none"),
)
TEXT_TOKENS, NEW_TOKENS = 40, 24  # together the smallest context of these models
THREADS = (1, 2)
STORY, STORY_TOKENS = "Once upon a time", 16


def main() -> None:
    """Print the machine, then the lines to compare."""
    print(
        f"# {platform.machine()} {target.cpu_name()} lowering={target.lowering().name} "
        f"python={platform.python_version()} numpy={np.__version__} numba={numba.__version__} "
        f"llvmlite={llvmlite.__version__} edgert={edgert.__version__}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name in NAMES:
            source = Path(scratch) / name
            tiny_models.write_folder(source, name)
            for quant in QUANTS_OF_ANY_WIDTH:
                file = Path(scratch) / f"{name}-{quant}.ert"
                edgert.convert(source, file, quant)
                print(f"{name} {quant} file={_digest(file.read_bytes())}", flush=True)
                # The cache knows nothing of the weights: its types once.
                for kv in KV_TYPES if quant == "q4" else KV_TYPES[:1]:
                    _tiny(f"{name} {quant}", file, kv)
        for bundled in BUNDLED:
            _bundled(*bundled, Path(scratch))


def _tiny(label: str, file: Path, kv: KvType) -> None:
    """Logits of a text, and what greedy generation makes of it."""
    text = tiny_models.tokens(TEXT_TOKENS)
    for threads in THREADS:
        began = time.perf_counter()
        with edgert.load(file, threads=threads, kv=kv) as model:
            logits = model.logits(text)
            tokens = model.generate(text, max_tokens=NEW_TOKENS).tokens
        _result(f"{label} kv={kv} threads={threads}", logits, tokens, began)


def _bundled(name: str, quant: Quant, sparsity: Sparsity, scratch: Path) -> None:
    """A story of a bundled model, and the logits along it."""
    neurons = ",neurons" if sparsity == "exact" else ""
    label, file = f"{name} {quant}{neurons}", scratch / f"{name}-{quant}{neurons}.ert"
    with resources.as_file(resources.files("edgert") / "assets" / name) as source:
        edgert.convert(source, file, quant, sparsity=sparsity)
    print(f"{label} file={_digest(file.read_bytes())}", flush=True)
    for threads in THREADS:
        began = time.perf_counter()
        with edgert.load(file, threads=threads) as model:
            tokens = model.generate(STORY, max_tokens=STORY_TOKENS).tokens
            logits = model.logits([*model.tokenizer.encode(STORY), *tokens])
        _result(f"{label} kv=f16 threads={threads}", logits, tokens, began)


def _result(label: str, logits: np.ndarray, tokens: Sequence[int], began: float) -> None:
    print(f"{label} logits={_digest(logits.tobytes())} tokens={','.join(map(str, tokens))}", flush=True)
    print(f"{label}: {time.perf_counter() - began:.1f} s", file=sys.stderr)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
