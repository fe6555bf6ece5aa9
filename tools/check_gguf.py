"""Compare conversions of GGUF files with llama.cpp: the ids of texts, and logits.

    python tools/check_gguf.py tokens --peer PYTHON [--text FILE]   every pre-tokenizer and SentencePiece
    python tools/check_gguf.py tokens --peer PYTHON FILE.gguf ...   and the vocabularies of files
    python tools/check_gguf.py tokens --peer PYTHON --write         store tests/goldens/gguf_tokens.json
    python tools/check_gguf.py logits --peer PYTHON [MODEL.gguf]    the table of docs/gguf.md

PYTHON is an interpreter with llama-cpp-python. The files are made here with the gguf package, of
the bundled model and of random ones; MODEL.gguf adds one of yours.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from numpy.typing import NDArray

import edgert
from edgert.converters.gguf.pretokenizers import PRE_TOKENIZERS
from edgert.converters.gguf.reader import GgufFile, open_gguf
from edgert.converters.gguf.vocabulary import read_vocabulary
from edgert.tokenizer import Tokenizer

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(ROOT))

from tests import gguf_files, gguf_others, tiny_models  # noqa: E402
from tools.gguf_texts import TEXTS, byte_level, sentence_piece  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens" / "gguf_tokens.json"
PEER = click.option("--peer", default=sys.executable, help="An interpreter with llama-cpp-python.")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # that the gguf package writes
REWRITTEN = (
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q6_K",
    "Q5_K_M",
    "Q4_K_M",
    "Q3_K_M",
    "Q2_K",
    "IQ4_NL",
    "IQ4_XS",
    "TQ2_0",
)
RANDOM = (
    "llama_gqa_tied",
    "llama_biases",
    "llama_rope_linear",
    "llama_rope_llama3",
    "llama_rope_yarn",
    "mistral_mqa_tied_head_dim",
    "qwen2_gqa_tied",
    "qwen3_gqa_tied_head_dim",
    "mixtral_gqa_tied",
    "olmoe_mha",
    "qwen2_moe_shared",
    "qwen3_moe_gqa_tied",
)


class Oracle:
    """llama.cpp in its own process."""

    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, str(TOOLS / "llama_cpp_oracle.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """The answer to one request; see llama_cpp_oracle.py."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"llama.cpp gave no answer to {request['do']} {request['file']}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def oracle(python: str) -> Iterator[Oracle]:
    """An Oracle, ended with the block."""
    made = Oracle(python)
    try:
        yield made
    finally:
        made.close()


@click.group()
def main() -> None:
    """Compare conversions of GGUF files with llama.cpp."""


@main.command()
@PEER
@click.option("--text", type=click.Path(path_type=Path), help="Compare the lines of this file too.")
@click.option("--write", is_flag=True, help="Store what llama.cpp gives as the goldens of the tests.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True))
def tokens(peer: str, text: Path | None, write: bool, files: tuple[Path, ...]) -> None:
    """Ids of texts, for every kind of vocabulary and those of FILES.

    Beside a file of llama.cpp's own test vocabularies lie texts (.inp) and the ids that the model's
    tokenizer in transformers gives them (.out); they are compared too.
    """
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text else []
    texts = TEXTS + lines
    described = {"byte_level": byte_level(), "sentence_piece": sentence_piece()}
    ids: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    with oracle(peer) as llama_cpp, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        for pre in (*PRE_TOKENIZERS, "sentence_piece"):
            kind = "sentence_piece" if pre == "sentence_piece" else "byte_level"
            write_vocabulary_file(path, described[kind], pre)
            metadata[kind] = tokenizer_keys(open_gguf(path))
            ids[pre] = compare_tokens(pre, path, llama_cpp, texts)[: len(TEXTS)]
        for path in files:
            try:
                compare_tokens(path.name, path, llama_cpp, texts)
            except edgert.EdgertError as error:
                print(error)
    if write:
        content = {"texts": TEXTS, "metadata": metadata, "ids": ids}
        lines = json.dumps(content, ensure_ascii=True).replace("], [", "],\n[")
        GOLDENS.write_text(lines + "\n")


def compare_tokens(name: str, path: Path, llama_cpp: Oracle, texts: list[str]) -> list[list[int]]:
    """Print how many texts get the ids of llama.cpp, and of transformers where they are stored."""
    ours = Tokenizer(read_vocabulary(open_gguf(path)).tokenizer_json)
    expected: list[list[int]] = llama_cpp.ask(do="tokenize", file=str(path), texts=texts)
    wrong = [t for t, e in zip(texts, expected, strict=True) if ours.encode(t) != e]
    print(f"{name:<18} {len(texts) - len(wrong)} of {len(texts)} texts equal", *map(repr, wrong[:5]))
    inputs, outputs = (path.with_name(path.name + end) for end in (".inp", ".out"))
    if inputs.is_file():
        *asked, _end = inputs.read_bytes().decode().split("\n__ggml_vocab_test__\n")
        ids = [[int(i) for i in line.split()] for line in outputs.read_text().splitlines()]
        same = sum(ours.encode(t, add_special=False) == e for t, e in zip(asked, ids, strict=True))
        print(f"{'':<18} {same} of {len(asked)} texts equal to transformers")
    return expected


def tokenizer_keys(file: GgufFile) -> dict[str, Any]:
    """The tokenizer's metadata as JSON, without what `write_vocabulary` takes as an argument."""
    prefix = "tokenizer.ggml."
    found = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}
    return {k: v for k, v in plain.items() if k != "pre"}


def write_vocabulary_file(path: Path, tokenizer: dict[str, Any], pre: str) -> None:
    """A file that holds a vocabulary and one small tensor, enough for llama.cpp's vocab_only."""
    writer = gguf.GGUFWriter(path, "llama")
    gguf_files.write_vocabulary(writer, tokenizer, pre)
    gguf_files.put(writer, "token_embd.weight", np.zeros((32, 32), np.float32))
    gguf_files.finish(writer)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    kind: str
    kept_as: str
    agreement: float  # of the most likely token
    difference: "Distance"  # between the two
    theirs: "Distance"  # llama.cpp from the file's weights in float32 arithmetic
    ours: "Distance"  # edgert from the same


@dataclass(frozen=True)
class Distance:
    """Between two sets of logits."""

    largest: float
    mean: float

    @classmethod
    def between(cls, one: NDArray[np.float32], two: NDArray[np.float32]) -> "Distance":
        """Of absolute differences."""
        difference = np.abs(one - two)
        return cls(float(difference.max()), float(difference.mean()))

    def __str__(self) -> str:
        return f"{self.largest:.1e}, {self.mean:.1e}"


@main.command()
@PEER
@click.argument("models", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--count", default=64, show_default=True, help="Tokens of the text that is compared.")
def logits(peer: str, models: tuple[Path, ...], count: int) -> None:
    """Logits of the bundled model, of random ones, and of MODELS, as a Markdown table."""
    print("| model | type | ours | same best token | difference | llama.cpp's error | edgert's error |")
    print("|---|---|---|---|---|---|---|")
    with oracle(peer) as llama_cpp, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in (*files(folder, llama_cpp), *models):
            row = compare(path, llama_cpp, folder, count)
            print(
                f"| {row.model} | {row.kind} | {row.kept_as} | {row.agreement:.1%} | {row.difference} | "
                f"{row.theirs} | {row.ours} |",
                flush=True,
            )


def files(folder: Path, llama_cpp: Oracle) -> Iterator[Path]:
    """The files that are compared, written one by one."""
    draft = ROOT / "edgert" / "assets" / "draft"
    for kind in KINDS:
        path = folder / f"draft.{kind}.gguf"
        gguf_files.export(draft, path, kind)
        yield path
    options: dict[str, Any] = {**{key: {} for key in RANDOM}, **gguf_others.CASES}
    for name, changed in options.items():
        config = tiny_models.CONFIGS[name] | changed
        tiny_models.write_model(folder / name, config, tiny_models.weights(config, tiny_models.SEED))
        path = folder / f"{name}.F32.gguf"
        gguf_files.export(folder / name, path)
        yield path
    config = (
        tiny_models.CONFIGS["gpt_oss_yarn"] | gguf_others.CASES["gpt_oss_yarn"] | {"intermediate_size": 64}
    )
    tiny_models.write_model(folder / "experts", config, tiny_models.weights(config, tiny_models.SEED))
    gguf_files.export(folder / "experts", folder / "gpt_oss_yarn.MXFP4.gguf", "MXFP4")
    yield folder / "gpt_oss_yarn.MXFP4.gguf"
    whole = folder / "wide.F32.gguf"
    write_wide(folder / "wide", whole)
    for kind in ("F32", *REWRITTEN):
        path = folder / f"wide.{kind}.gguf"
        if kind != "F32":
            llama_cpp.ask(do="quantize", file=str(whole), out=str(path), type=kind)
        yield path


def config_of_experts() -> Any:
    """Of gpt-oss, with matrices that MXFP4 holds."""
    own = gguf_others.CASES["gpt_oss_yarn"] | {"intermediate_size": 64}
    return tiny_models.CONFIGS["gpt_oss_yarn"] | own


def write_wide(folder: Path, path: Path) -> None:
    """A random model whose rows fill the blocks of 256 of every type."""
    config = tiny_models.CONFIGS["llama_gqa_tied"] | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "head_dim": 64,
        "tie_word_embeddings": False,
    }
    tiny_models.write_model(folder, config, tiny_models.weights(config, tiny_models.SEED))
    gguf_files.export(folder, path)


def compare(path: Path, llama_cpp: Oracle, folder: Path, count: int) -> Row:
    """Convert a file, once as it is and once to float32, and run all on one text.

    The float32 file holds the very weights of the source, so that both programs' distance from its
    logits is what their own arithmetic, and what edgert rounded, cost.
    """
    converted, out = folder / "converted.ert", folder / "logits.npy"
    report = edgert.convert(path, converted)
    matrices = [t for t in report.tensors if len(t.shape) > 1 and "router" not in t.name]
    with edgert.load(converted, threads=1) as model:
        vocab = model.spec.vocab
        text = [1, *((np.arange(count - 1) * 7919 + 5) % (vocab - 3) + 3).tolist()]
        ours = model.logits(text)
    edgert.convert(path, converted, "f32")
    with edgert.load(converted, threads=1) as model:
        exact = model.logits(text)
    llama_cpp.ask(do="logits", file=str(path), tokens=text, out=str(out), batch=count)
    theirs: NDArray[np.float32] = np.load(out)
    name, _, kind = path.stem.rpartition(".")
    return Row(
        model=name or path.stem,
        kind=kind,
        kept_as="+".join(sorted({t.quant for t in matrices})),
        agreement=float((ours.argmax(1) == theirs.argmax(1)).mean()),
        difference=Distance.between(ours, theirs),
        theirs=Distance.between(theirs, exact),
        ours=Distance.between(ours, exact),
    )


if __name__ == "__main__":
    main()
