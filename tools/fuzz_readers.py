"""Damage files at random and see that every reader answers with a model or with one of our errors.

    python tools/fuzz_readers.py gguf --cases 10000 [--seed 0] [--keep FOLDER]
    python tools/fuzz_readers.py hf --only 123        one case again, in this process

Readers: gguf, hf and onnx convert a model, ert opens and verifies a file. A case is a function of the
reader, the seed and its number. Cases run in forked processes with an address space of what Python
and its libraries take and MEMORY more. What counts as a failure: any other exception (a MemoryError
too), a warning, a crash, a case of more than LIMIT seconds of processor time or WAIT of any, and a
file left behind.
"""

import base64
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
import gguf
import numpy as np

import edgert
from edgert.config import ModelSpec
from edgert.converters import convert
from edgert.errors import EdgertError
from edgert.format import ErtFile, ErtWriter, declared
from edgert.format.verify import check
from edgert.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import gguf_files, test_fp8, test_mxfp4, tiny_models  # noqa: E402
from tools.gguf_texts import byte_level, sentence_piece  # noqa: E402

MEMORY: Final = 512 << 20  # the models take a megabyte
LIMIT: Final = 30.0  # seconds of processor time; a case takes milliseconds
WAIT: Final = 900.0  # seconds; a process of low priority may wait long for its turn
BATCH: Final = 500  # cases of one process, so that what one leaks does not fail another

INTERESTING: Final = (0, 1, 2, 31, 32, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
WIDE: Final = (*INTERESTING, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
WORDS: Final = (
    b"0",
    b"-1",
    b"1e309",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b"2147483647",
    b"4294967296",
)
LONG: Final = b"99999999999999999999999999"

Sample = dict[str, bytes]
"""Files by name; one is damaged."""


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four kinds of damage, most of them where the header is."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if changed:
            draw.choice(DAMAGE)(changed, draw)
    return bytes(changed)


def _place(data: bytearray, draw: random.Random) -> int:
    end = len(data) if draw.random() < 0.2 else min(len(data), draw.choice((64, 512, 4096, 65536)))
    return draw.randrange(end)


def _flip(data: bytearray, draw: random.Random) -> None:
    data[_place(data, draw)] ^= 1 << draw.randrange(8)


def _byte(data: bytearray, draw: random.Random) -> None:
    data[_place(data, draw)] = draw.randrange(256)


def _number(data: bytearray, draw: random.Random) -> None:
    """A 32-bit or 64-bit number, at any place."""
    start, code = _place(data, draw), draw.choice("IQ")
    size = struct.calcsize(code)
    if start + size <= len(data):
        old = int.from_bytes(data[start : start + size], "little")
        value = draw.choice((*WIDE, len(data), old + 1, old - 1, old * 2, draw.getrandbits(8 * size)))
        data[start : start + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[_place(data, draw) :]


def _remove(data: bytearray, draw: random.Random) -> None:
    start = _place(data, draw)
    del data[start : start + draw.choice((1, 4, 8, 100))]


def _repeat(data: bytearray, draw: random.Random) -> None:
    start = _place(data, draw)
    data[start:start] = data[start : start + draw.choice((1, 4, 8, 100, 2000))]


def _insert(data: bytearray, draw: random.Random) -> None:
    start = _place(data, draw)
    data[start:start] = draw.choice(
        (b"\0", b"\xff", b"[" * 2000, b'{"a":', b"\\ud800", b"\xf0\x9f\x98", LONG)
    )


def _swap(data: bytearray, draw: random.Random) -> None:
    size = draw.choice((4, 8, 40))
    one, two = _place(data, draw), _place(data, draw)
    piece = bytes(data[one : one + size])
    data[one : one + size] = data[two : two + size]
    data[two : two + size] = piece


def _word(data: bytearray, draw: random.Random) -> None:
    """A number or a string of JSON by another value."""
    found = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"\\]{0,40}"', bytes(data[: 1 << 16])))
    if found:
        match = draw.choice(found)
        data[match.start() : match.end()] = draw.choice((*WORDS, LONG, *(m.group() for m in found[:50])))


DAMAGE: Final = (_flip, _byte, _number, _number, _cut, _remove, _repeat, _insert, _swap, _word, _word)


def gguf_samples(folder: Path) -> Iterator[Sample]:
    """Whole and split files, of every vocabulary and several types."""
    kinds = {"llama_gqa_tied": "F16", "qwen2_gqa_tied": "Q8_0", "llama_rope_llama3": "Q4_0"}
    kinds |= {"mixtral_gqa_tied": "Q4_0", "qwen2_moe_shared": "Q8_0"}
    kinds |= {"gemma2_caps": "Q4_0", "phi3_partial_longrope": "F16", "granite_untied_head_dim": "Q8_0"}
    kinds |= {"gpt_neox_parallel": "F16", "glm4_gqa": "Q8_0", "smollm3_no_rope_layers": "F32"}
    kinds |= {"gpt_oss_yarn": "F16", "deepseek_v2_lite": "Q8_0", "deepseek_v3_yarn": "Q4_0"}
    for name, kind in kinds.items():
        tiny_models.write_folder(folder / name, name)
        for part, make in enumerate((None, byte_level, sentence_piece)):
            if make is not None:
                config = json.loads((folder / name / "config.json").read_text())
                described = make()
                (folder / name / "tokenizer.json").write_text(json.dumps(described))
                _grow(folder / name, config, len(described["model"]["vocab"]))
            path = folder / f"{name}{part}.gguf"
            gguf_files.export(folder / name, path, kind)
            yield {"m.gguf": path.read_bytes()}
    gguf_files.export(folder / "llama_gqa_tied", folder / "parts.gguf", "Q4_1", parts=8)
    yield {path.name: path.read_bytes() for path in sorted(folder.glob("parts-*.gguf"))}
    yield {"m.gguf": _every_type(folder / "types.gguf")}


def _grow(folder: Path, config: dict[str, object], vocab: int) -> None:
    """The model again, with a row for each token of a larger vocabulary."""
    tokenizer = (folder / "tokenizer.json").read_text()
    larger = config | {"vocab_size": vocab}
    tiny_models.write_model(folder, larger, tiny_models.weights(larger, 0))
    (folder / "tokenizer.json").write_text(tokenizer)


def _every_type(path: Path) -> bytes:
    """One layer whose matrices are in types that only llama.cpp writes; their bytes are random."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 256)):
        writer.add_uint32(f"llama.{key}", value)
    for key, value in (("feed_forward_length", 256), ("attention.head_count", 4)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    gguf_files.write_vocabulary(writer, sentence_piece())
    kinds = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XS", "IQ4_XS", "IQ1_M", "IQ3_S")
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = ("token_embd", "output", *(f"blk.0.{part}" for part in parts))
    for name, kind in zip(names, kinds, strict=True):
        number = gguf.GGMLQuantizationType[kind]
        rows = len(sentence_piece()["model"]["vocab"]) if "." not in name else 256
        # No byte from 0x78 on: no scale is infinite.
        data = rng.integers(0, 0x78, (rows, gguf.GGML_QUANT_SIZES[number][1]), np.uint8)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=number)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    gguf_files.finish(writer)
    return path.read_bytes()


def hf_samples(folder: Path) -> Iterator[Sample]:
    """Folders in one and in two shards."""
    names = ("llama_rope_llama3", tiny_models.SHARDED, "mistral_window_yarn_factor", "granitemoe_tied")
    gated = ("gemma2_caps", "gemma3_scaled_cap_v4", "phi3_partial_longrope", "smollm3_windows", "glm4_gqa")
    plain = ("gpt2_defaults", "gpt_neox_parallel", "opt_relu", "falcon_alibi", "cohere_tied")
    routed = ("gpt_oss_yarn", "deepseek_v2_groups_biases", "deepseek_v3_yarn", "gpt_oss_mxfp4")
    halved = {"deepseek_v3_yarn_fp8": (16, 24), "qwen3_mqa_odd_sizes_fp8": (7, 5)}
    halved |= {"llama_gqa_tied_fp8": (1 << 19, 3), "qwen3_mha_biases_fp8": (128, 128)}
    for name in (*names, *gated, *plain, *routed, *halved, "exaone4_hybrid", "qwen3_moe_biases_window"):
        if name == "gpt_oss_mxfp4":
            test_mxfp4.write_published(folder / name)
        elif name in halved:
            test_fp8.write_published(folder / name, name.removesuffix("_fp8"), *halved[name])
        else:
            tiny_models.write_folder(folder / name, name)
        (folder / name / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ 1 }}"})
        )
        yield {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}
    yield _with_pictures(folder / "gemma3_scaled_cap_v4")
    (folder / name / "tokenizer.json").unlink()
    stored = json.loads((ROOT / "tests" / "goldens" / "sentencepiece.json").read_text())
    (folder / name / "tokenizer.model").write_bytes(base64.b64decode(stored["model"]))
    (folder / name / "added_tokens.json").write_text('{"<end>": 480}')
    yield {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}


def _with_pictures(folder: Path) -> Sample:
    """A model as the language model of one that sees, whose tensors have other names."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    config = json.loads(files["config.json"])
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": config,
    }
    files["config.json"] = json.dumps(outer | {"eos_token_id": 2}).encode()
    renamed = re.sub(rb'"model\.', b'"model.language_model.', files["model.safetensors"][8:])
    length = int.from_bytes(files["model.safetensors"][:8], "little")
    added = len(renamed) - len(files["model.safetensors"]) + 8
    files["model.safetensors"] = (length + added).to_bytes(8, "little") + renamed
    return files


def onnx_samples(folder: Path) -> Iterator[Sample]:
    """Both styles, with the weights inside and beside, floats and blocks."""
    from tests import onnx_files  # needs the extra `convert`

    kinds: tuple[tuple[str, str, dict[str, str]], ...] = (
        ("llama_gqa_tied", "spelled", {}),
        ("qwen2_gqa_tied", "operators", {"blocks": "zeros"}),
        ("qwen3_heads_of_32", "spelled", {"kind": "f16"}),
        ("llama_gqa_tied", "operators", {"blocks": "middle"}),
        ("llama_mha", "heads", {}),
    )
    for external in (False, True):
        for number, (name, style, options) in enumerate(kinds):
            place = folder / f"{number}{external}"
            path = onnx_files.written(place, name, style, external, **options)
            if style == "heads" and not external:
                onnx_files.merge(path)
            yield {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def ert_samples(folder: Path) -> Iterator[Sample]:
    """Files of every quantisation."""
    for name, quant in (
        ("llama_gqa_tied", "q4"),
        ("qwen2_moe_shared", "q8"),
        ("qwen3_mha_biases", "f16"),
        ("gpt2_defaults", "q8"),
    ):
        tiny_models.write_folder(folder / name, name)
        convert(folder / name, folder / f"{name}.ert", quant)
        yield {"m.ert": (folder / f"{name}.ert").read_bytes()}
    yield {"m.ert": _with_outliers(folder / "outliers.ert")}


def _with_outliers(path: Path) -> bytes:
    """Outlier columns apart, without the calibration that would find them: every weight is one byte."""
    spec = ModelSpec("llama", 2, 64, 4, 2, 16, 96, 96, 64, 1e-5, outliers=32)
    quants = {decl.name: "q8" for decl in declared(spec) if decl.role == "matrix"}
    with ErtWriter(path, spec, quants) as writer:
        for name, tensor in writer.tensors.items():
            columns = np.arange(32, dtype=np.float32)
            data = columns.tobytes() if name.endswith("_columns") else bytes([1]) * tensor.nbytes
            writer.write(name, data)
        writer.finish()
    return path.read_bytes()


def read_converted(folder: Path) -> None:
    """Convert what is in a folder."""
    first = min(folder.glob("*.gguf"), default=folder)
    convert(first, folder / "out.ert")


def read_ert(folder: Path) -> None:
    """Open, verify, and make the tokenizer."""
    with ErtFile.open(folder / "m.ert") as file:
        tokenizer = file.tokenizer_json()
        for name in file.tensors:
            file.raw(name)
    check(folder / "m.ert")
    if tokenizer is not None:
        Tokenizer(tokenizer)


Reader = tuple[Callable[[Path], Iterator[Sample]], Callable[[Path], None]]
READERS: Final[dict[str, Reader]] = {
    "gguf": (gguf_samples, read_converted),
    "hf": (hf_samples, read_converted),
    "onnx": (onnx_samples, read_converted),
    "ert": (ert_samples, read_ert),
}


def case(samples: list[Sample], number: int, seed: int) -> Sample:
    """The files of a case."""
    draw = random.Random(f"{seed} {number}")
    sample = dict(draw.choice(samples))
    name = draw.choice(sorted(sample))
    sample[name] = mutated(sample[name], draw)
    return sample


def run_case(sample: Sample, read: Callable[[Path], None], scratch: Path) -> str:
    """What became of a case: "read", the name of our error, or a line that starts with FAILED."""
    shutil.rmtree(scratch, ignore_errors=True)
    _store(sample, scratch)
    try:
        read(scratch)
        outcome = "read"
    except EdgertError as error:
        outcome = type(error).__name__
        if "\n" in str(error) or len(str(error)) > 2000:
            outcome = f"FAILED message of {len(str(error))} characters: {str(error)[:100]!r}"
    except BaseException as error:
        outcome = f"FAILED {type(error).__name__}: {str(error)[:200]!r}"
    left = {path.name for path in scratch.iterdir()} - set(sample) - {"out.ert"}
    return f"FAILED left {sorted(left)}" if left else outcome


def _child(samples: list[Sample], numbers: range, seed: int, read: Callable[[Path], None], out: int) -> None:
    """The body of a forked process: a line for each case as it ends."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        for number in numbers:
            outcome = run_case(case(samples, number, seed), read, Path(folder) / "case")
            os.write(out, f"{number} {' '.join(outcome.split())}\n".encode())


SCRATCH: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None


def outcomes(
    samples: list[Sample], numbers: range, seed: int, read: Callable[[Path], None]
) -> Iterator[tuple[int, str]]:
    """The outcome of every case, in order, whatever happens to the processes that run them."""
    start = numbers.start
    while start < numbers.stop:
        stop = min(start + BATCH, numbers.stop)
        source, sink = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(source)
            status = 1
            try:
                _child(samples, range(start, stop), seed, read, sink)
                status = 0
            finally:
                os._exit(status)
        os.close(sink)
        end = "crashed"
        pending = b""
        while start < stop:
            if not _wait(source, process):
                os.kill(process, signal.SIGKILL)
                end = f"took more than {LIMIT:.0f} s"
                break
            received = os.read(source, 1 << 16)
            if not received:
                break
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                number, _, outcome = line.decode().partition(" ")
                yield int(number), outcome
                start = int(number) + 1
        os.close(source)
        _, status = os.waitpid(process, 0)
        if start < stop:
            yield start, f"FAILED {end}, status {os.waitstatus_to_exitcode(status)}"
            start += 1


def _store(sample: Sample, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in sample.items():
        (folder / name).write_bytes(data)


def _wait(source: int, process: int) -> bool:
    """Until there is something to read; False if the process works or waits for too long."""
    began, worked = time.monotonic(), _cpu_seconds(process)
    while not select.select([source], [], [], 5.0)[0]:
        if _cpu_seconds(process) - worked > LIMIT or time.monotonic() - began > WAIT:
            return False
    return True


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


@click.command()
@click.argument("reader", type=click.Choice(list(READERS)))
@click.option("--cases", default=1000, show_default=True, help="How many.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other cases.")
@click.option("--only", type=int, help="Run this case alone and let its exception through.")
@click.option("--keep", type=click.Path(path_type=Path), help="Store the files of failures here.")
def main(reader: str, cases: int, seed: int, only: int | None, keep: Path | None) -> None:
    """Damage files and count how a reader answers; exit status 1 after a failure.

    An interrupt ends the run with the count so far.
    """
    make, read = READERS[reader]
    with tempfile.TemporaryDirectory() as folder:
        samples = list(make(Path(folder)))
    if only is not None:
        with tempfile.TemporaryDirectory() as folder:
            _store(case(samples, only, seed), Path(folder))
            read(Path(folder))
        return
    counts: Counter[str] = Counter()
    with suppress(KeyboardInterrupt):
        for number, outcome in outcomes(samples, range(cases), seed, read):
            failed = outcome.startswith("FAILED")
            counts["FAILED" if failed else outcome] += 1
            if failed:
                print(f"case {number}: {outcome}", flush=True)
                if keep is not None:
                    _store(case(samples, number, seed), keep / f"{reader}-{seed}-{number}")
    print(f"{reader}: {sum(counts.values()):,} cases of edgert {edgert.__version__}, seed {seed}: ", end="")
    print(", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common()))
    sys.exit(1 if counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
