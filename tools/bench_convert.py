"""A conversion's time and memory beside llama.cpp's converter and quantiser, on the same folder.

    python tools/bench_convert.py --peer PYTHON --work FOLDER [--shape llama-3.2-1b] [-r 1] [-o FILE.json]

The folder holds random weights of a shape in bfloat16, as a model is published; it is made once. PYTHON is an
interpreter with llama-cpp-python and gguf. llama.cpp's own converter is a script of its repository that no
package brings; what stands in for it (llama_cpp_convert.py) does its least work: every tensor is copied as
it is, q and k in another order. So the sum for llama.cpp is rather too small.

Each program runs in a process of its own, on as many threads as it takes by itself; our kernels are compiled
before. `resident` is the
most memory its process held, mapped pages of files among them; `own` is the most without these, looked at
50 times a second. Files are read from the page cache where it holds them: the folder is read once before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgert.config import ModelSpec
from edgert.model.shapes import shape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny_models  # noqa: E402

CONVERT = Path(__file__).with_name("llama_cpp_convert.py")
SLAB = 1 << 22  # weights drawn at once
LOOK = 0.02  # seconds between looks at a process's memory


@dataclass(frozen=True, slots=True)
class Run:
    """What one program took."""

    program: str
    made: str
    seconds: float
    cpu_seconds: float
    resident: int  # bytes
    own: int  # bytes
    size: int  # bytes of what it wrote


def write_folder(folder: Path, spec: ModelSpec) -> None:
    """A model of a shape as a Hugging Face folder: Gaussian weights in bfloat16, norms of 1."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn_width,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tiny_models.tokenizer().to_str())
    shapes = dict(_shapes(spec))
    header, at = {}, 0
    for name, dims in shapes.items():
        nbytes = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors.part").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in shapes.values():
            left, spread = int(np.prod(dims)), dims[-1] ** -0.5
            while left:
                count = min(left, SLAB)
                values = np.ones(count, np.float32)
                if len(dims) > 1:
                    values = rng.standard_normal(count, np.float32) * np.float32(spread)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
                left -= count
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")


def _shapes(spec: ModelSpec) -> Any:
    """Hugging Face name and shape of every tensor of a Llama."""
    width, queries, keys = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield "model.embed_tokens.weight", [spec.vocab, width]
    for layer in range(spec.layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", [width]
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{name}.self_attn.{part}_proj.weight", [rows, width]
        yield f"{name}.self_attn.o_proj.weight", [width, queries]
        yield f"{name}.post_attention_layernorm.weight", [width]
        yield f"{name}.mlp.gate_proj.weight", [spec.ffn_width, width]
        yield f"{name}.mlp.up_proj.weight", [spec.ffn_width, width]
        yield f"{name}.mlp.down_proj.weight", [width, spec.ffn_width]
    yield "model.norm.weight", [width]
    if not spec.tied_embeddings:
        yield "lm_head.weight", [spec.vocab, width]


def measured(program: str, made: str, out: Path, command: list[str]) -> Run:
    """Run a program to its end and see what it took."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    own = 0
    status = Path(f"/proc/{process.pid}/status")
    while True:  # until it ends; reaped here, its own use is known
        own = max(own, _own_bytes(status))
        pid, code, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(LOOK)
    seconds = time.monotonic() - started
    assert process.stderr
    said = process.stderr.read().decode(errors="replace")
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise SystemExit(f"{program} failed: {' '.join(command)}\n{said[-2000:]}")
    return Run(
        program, made, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, own, out.stat().st_size
    )


def _own_bytes(status: Path) -> int:
    """Anonymous memory of a process."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def runs(folder: Path, scratch: Path, peer: str) -> list[Callable[[], Run]]:
    """What is measured, in this order: ours, and llama.cpp's two steps."""
    whole = scratch / "bf16.gguf"

    def ours(quant: str) -> Callable[[], Run]:
        out = scratch / "out.ert"
        command = [sys.executable, "-m", "edgert", "convert", str(folder), "-o", str(out), "--quant", quant]
        return lambda: measured("edgert convert", quant, out, command)

    def theirs(kind: str) -> Callable[[], Run]:
        out = scratch / "out.gguf"
        command = [peer, str(CONVERT), "quantize", str(whole), str(out), kind]
        return lambda: measured("llama_model_quantize", kind, out, command)

    copy = [peer, str(CONVERT), "copy", str(folder), str(whole)]
    return [
        ours("q4"),
        lambda: measured("stand-in for convert_hf_to_gguf", "BF16", whole, copy),
        theirs("Q4_0"),
        theirs("Q4_K_M"),
        ours("q8"),
        theirs("Q8_0"),
    ]


def main() -> None:
    """Measure, print a table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="an interpreter with llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, required=True, help="keeps the folder; needs 4 times its size")
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, to try it out")
    parser.add_argument("--prepare", action="store_true", help="only make the folder")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    spec = shape(options.shape)
    if options.layers:
        spec = ModelSpec.from_json(spec.to_json() | {"layers": options.layers})
    folder = options.work / f"{options.shape}-{spec.layers}"
    if not (folder / "model.safetensors").is_file():
        write_folder(folder, spec)
    if options.prepare:
        return
    with (folder / "model.safetensors").open("rb") as file:
        while file.read(1 << 24):
            pass
    compile_kernel = (
        "import numpy; from edgert.converters.quantize import quantize as q; q(numpy.eye(32, 32), 'q4')"
    )
    subprocess.run([sys.executable, "-c", compile_kernel], check=True, cwd=ROOT)
    print("| program | type | seconds | CPU seconds | resident, MiB | own, MiB | written, MiB |")
    print("|---|---|---|---|---|---|---|")
    found = []
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        for run in runs(folder, Path(scratch), options.peer):
            found.append(run())
            r = found[-1]
            sizes = (f"{nbytes / (1 << 20):.0f}" for nbytes in (r.resident, r.own, r.size))
            print(
                f"| {r.program} | {r.made} | {r.seconds:.1f} | {r.cpu_seconds:.1f} | {' | '.join(sizes)} |",
                flush=True,
            )
    if options.output:
        record = {"shape": options.shape, "layers": spec.layers, "cores": os.cpu_count()}
        options.output.write_text(json.dumps(record | {"runs": [asdict(r) for r in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
