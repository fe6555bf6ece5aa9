"""What can go wrong with a command: one line that says what to do, and the right exit status."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

import edgert
from edgert.engine import Engine
from edgert.format import ErtFile
from edgert.format.writer import Disk
from tests import tiny_models

Cli = Callable[..., Any]
FAILED, USAGE = 1, 2


def refused(done: Any, status: int, *parts: str) -> None:
    """The command ended with this status and one line on stderr that holds the parts in order."""
    assert done.status == status, done
    assert done.out == ""
    assert done.err.startswith("edgert: ") and done.err.endswith("\n") and done.err.count("\n") == 1
    place = 0
    for part in parts:
        assert part in done.err[place:], done.err
        place = done.err.index(part, place)
    assert "Traceback" not in done.err


# Usage


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nonsense"], ["No such command 'nonsense'", "see `edgert --help`"]),
        (["run"], ["Missing argument 'FILE'", "see `edgert run --help`"]),
        (["run", "FILE", "--fast"], ["No such option", "--fast", "see `edgert run --help`"]),
        (["run", "FILE", "other"], ["unexpected extra argument", "other"]),
        (["run", "FILE", "-n", "many"], ["Invalid value for '-n'", "'many'"]),
        (["run", "FILE", "-n", "-1"], ["max_tokens is -1; expected >= 0"]),
        (["run", "FILE", "--temperature", "-1"], ["temperature is -1.0; expected a finite number >= 0"]),
        (["run", "FILE", "--temperature", "inf"], ["temperature is inf; expected a finite number"]),
        (["run", "FILE", "--top-p", "2"], ["top_p is 2.0; expected in (0, 1]"]),
        (["run", "FILE", "--top-k", "-3"], ["top_k is -3; expected >= 0"]),
        (["run", "FILE", "--min-p", "1"], ["min_p is 1.0; expected in [0, 1)"]),
        (["run", "FILE", "--stop", ""], ["stop holds an empty string"]),
        (["run", "FILE", "--ram", "12x"], ["a size of '12x'; expected", "512MiB"]),
        (["run", "FILE", "-t", "0"], ["threads is 0; expected 1 to 256"]),
        (["run", "FILE", "-c", "65"], ["context is 65; expected 1 to 64"]),
        (["run", "FILE", "--chunk", "0"], ["chunk is 0; expected 1 to 4096"]),
        (["run", "FILE", "--kv", "q5"], ["Invalid value for '--kv'", "'f16', 'q8', 'q4'"]),
        (["convert", "FILE"], ["Missing option '-o'"]),
        (["convert", "FILE", "-o", "x.ert", "--quant", "q5"], ["Invalid value for '--quant'", "'q4'"]),
        (["bench"], ["give either a FILE or a --shape NAME"]),
        (["bench", "FILE", "--shape", "llama-3.2-1b"], ["give either a FILE or a --shape NAME"]),
        (["bench", "FILE", "--quant", "q4"], ["--quant applies to --shape; a FILE has its own precision"]),
        (["bench", "--shape", "gpt-5"], ["there is no shape 'gpt-5'; there are:", "llama-3.2-1b"]),
        (["bench", "FILE", "-r", "0"], ["-r must be at least 1"]),
        (["bench", "FILE", "-p", "-1"], ["not negative"]),
        (["bench", "FILE", "-p", "0", "-n", "0"], ["nothing to time"]),
        (
            ["bench", "FILE", "-p", "65", "-n", "1"],
            ["65 tokens do not fit in a context of 64", "fewer tokens"],
        ),
        (["bench", "FILE", "-p", "9", "-c", "8"], ["do not fit in a context of 8", "larger --context"]),
        (["eval", "FILE"], ["Missing option '--text'"]),
        (["eval", "FILE", "--text", "absent"], ["absent: No such file", "expected a text file or a .jsonl"]),
        (["eval", "FILE", "--text", "FILE"], ["not UTF-8 at byte", "expected a text file"]),
        (["eval", "FILE", "--text", "FILE", "--last", "0"], ["--last is 0; expected at least 1"]),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused(cli: Cli, tiny_file: Path, arguments: list[str], parts: list[str]) -> None:
    given = [str(tiny_file) if argument == "FILE" else argument for argument in arguments]
    if arguments[0] == "run":
        given += ["-p", "abc"]
    refused(cli(*given), USAGE, *parts)


def test_empty_prompt_is_refused_where_the_model_has_no_start_token(cli: Cli, tiny_file: Path) -> None:
    refused(cli("run", tiny_file, "-p", ""), USAGE, "the prompt is empty; expected at least one token")
    refused(cli("run", tiny_file, stdin=""), USAGE, "the prompt is empty")


# Files that are no model


@pytest.mark.parametrize("verb", ["run", "inspect", "verify", "bench", "eval", "chat"])
def test_absent_file_is_named(cli: Cli, tmp_path: Path, verb: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text.")
    more = {"run": ["-p", "abc"], "eval": ["--text", text]}.get(verb, [])
    path = tmp_path / "absent.ert"
    refused(
        cli(verb, path, *more), FAILED, f"{path}: found no such file, expected an .ert file; check the path"
    )


def test_files_of_other_kinds_are_recognised(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    def run(path: Path) -> Any:
        return cli("run", path, "-p", "abc")

    contents = {
        "notes.txt": (b"Dear diary, today I downloaded a model.\n" * 9, ["not a safetensors header"]),
        "empty.ert": (b"", ["found an empty file, expected an .ert file", "copy or convert it again"]),
        "model.gguf": (b"GGUF\x03\0\0\0" + bytes(64), ["found a GGUF file", "edgert convert"]),
        "model.bin": (b"PK\x03\x04" + bytes(64), ["PyTorch checkpoint", "edgert convert FOLDER"]),
        "model.ert": (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer"]),
    }
    for name, (blob, parts) in contents.items():
        path = tmp_path / name
        path.write_bytes(blob)
        refused(run(path), FAILED, str(path), *parts)
    refused(run(tmp_path), FAILED, f"{tmp_path}: found a folder, expected an .ert file")
    refused(run(tiny_folder), FAILED, "found a Hugging Face folder", f"edgert convert {tiny_folder} -o")
    refused(run(tiny_folder / "model.safetensors"), FAILED, "without edgert's metadata", "edgert convert")


def test_truncated_file_is_refused(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    whole, path = tiny_file.read_bytes(), tmp_path / "short.ert"
    for length in (4, 100, 5000, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        path.write_bytes(whole[:length])
        for verb in (["run", path, "-p", "abc"], ["verify", path], ["inspect", path]):
            refused(cli(*verb), FAILED, f"{path}: ", "copy it again or convert the model again")


def flipped(source: Path, target: Path, byte: int) -> Path:
    blob = bytearray(source.read_bytes())
    blob[byte] ^= 0x10
    target.write_bytes(blob)
    return target


def test_flipped_bit_in_a_tensor_is_found(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    with ErtFile.open(tiny_file) as file:
        tensors = [file.tensors[name] for name in ("token_embedding", "layers.1.o", "output_norm")]
    for tensor in tensors:
        path = flipped(tiny_file, tmp_path / "flipped.ert", tensor.offset + tensor.nbytes // 2)
        parts = [str(path), f"in {tensor.name} (1 of", "expected their SHA-256", "copy the file again"]
        refused(cli("verify", path), FAILED, *parts)
        refused(cli("run", path, "-p", "abc", "--check-tensors"), FAILED, *parts)


def test_flipped_bit_in_the_header_is_refused(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    header = tiny_file.read_bytes()[: 8 + 4000]
    structure = [0, 1, 8, *(i for i, byte in enumerate(header) if byte in b'{}[]:"')]
    for byte in structure[:: max(1, len(structure) // 25)]:
        path = flipped(tiny_file, tmp_path / "flipped.ert", byte)
        for verb in ("run", "verify"):
            done = cli(verb, path, *(["-p", "abc"] if verb == "run" else []))
            refused(done, FAILED, str(path))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the NumPy twins
def test_weights_that_are_no_numbers_are_found_by_a_run(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.ert"
    with ErtFile.open(tiny_file) as file:
        tensor = file.tensors["output_norm"]
    blob = bytearray(tiny_file.read_bytes())
    blob[tensor.offset : tensor.offset + tensor.nbytes] = np.full(40, np.nan, np.float32).tobytes()
    path.write_bytes(blob)
    refused(cli("run", path, "-p", "abc", "--json"), FAILED, "logit nan", "damaged (see `edgert verify`)")


# Limits


def test_prompt_longer_than_the_context_is_refused(cli: Cli, tiny_file: Path) -> None:
    refused(
        cli("run", tiny_file, "-p", "a" * 64, "--json"),
        FAILED,
        "the prompt has 64 tokens, expected at most 63 in a context of 64; shorten it",
    )
    refused(
        cli("run", tiny_file, "-p", "a" * 20, "-c", 20, "--json"),
        FAILED,
        "at most 19 in a context of 20; shorten it, or load with a larger context",
        "own is 64",
    )


def test_too_little_memory_is_refused_and_the_least_is_named(cli: Cli, tiny_file: Path) -> None:
    done = cli("run", tiny_file, "-p", "abc", "-n", 1, "--ram", "10MiB")
    refused(
        done, FAILED, "ram is 10 MiB, but this needs", "weights", "cache of 64 positions", "give at least"
    )
    least = done.err.split("give at least ")[1].split(",")[0]
    assert cli("run", tiny_file, "-p", "abc", "-n", 1, "--ram", least).status == 0


def test_chat_without_a_template_is_refused_before_the_first_question(cli: Cli, tiny_file: Path) -> None:
    refused(cli("chat", tiny_file, stdin="Hi\n"), FAILED, "no chat template", "`edgert run`")


# Conversion


def test_convert_says_what_it_cannot_read(cli: Cli, tmp_path: Path) -> None:
    def convert(source: Path) -> Any:
        return cli("convert", source, "-o", tmp_path / "out.ert")

    refused(convert(tmp_path / "absent"), FAILED, "found no such file or folder", "check the path")
    refused(convert(tmp_path), FAILED, "found no config.json", "download the model")
    notes = tmp_path / "notes.txt"
    notes.write_text("no model")
    refused(convert(notes), FAILED, "expected a Hugging Face folder")
    assert not (tmp_path / "out.ert").exists()


def test_unsupported_architecture_names_those_there_are(cli: Cli, tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["llama_mha"] | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    tiny_models.write_model(tmp_path / "m", config, tiny_models.weights(tiny_models.CONFIGS["llama_mha"], 1))
    done = cli("convert", tmp_path / "m", "-o", tmp_path / "out.ert")
    refused(done, FAILED, "mamba", "expected", "llama", "qwen3")


def test_convert_to_a_folder_that_is_not_there(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    done = cli("convert", tiny_folder, "-o", tmp_path / "no" / "out.ert")
    refused(done, FAILED, f"found no folder {tmp_path / 'no'} to write to; make it first")
    done = cli("convert", tiny_folder, "-o", tmp_path)
    refused(done, FAILED, "found a folder, expected the name of a file to write")


class FullFile:
    """A file on a disk that fills up after some bytes."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: bytes) -> int:
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_full_disk_leaves_nothing_behind(
    cli: Cli, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Disk.create
    monkeypatch.setattr(Disk, "create", lambda disk, path: FullFile(create(disk, path), 20000))
    out = tmp_path / "out.ert"
    out.write_bytes(b"an older model")
    done = cli("convert", tiny_folder, "-o", out)
    refused(done, FAILED, f"{out}: found its disk full", "free some space or write to another disk")
    assert [path.name for path in tmp_path.iterdir()] == ["out.ert"]
    assert out.read_bytes() == b"an older model"


def test_too_small_disk_is_found_before_writing(
    cli: Cli, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "free", lambda disk, folder: 1000)
    done = cli("convert", tiny_folder, "-o", tmp_path / "out.ert")
    refused(done, FAILED, "found 1,000 bytes free on its disk, expected", "free some space")
    assert not list(tmp_path.iterdir())


def test_file_size_limit_of_the_system_leaves_nothing_behind(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "edgert", "convert", tiny_folder, "-o", tmp_path / "out.ert"]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 20 && exec "$@"', "sh", *arguments], capture_output=True, text=True
    )
    assert done.returncode == FAILED
    assert done.stderr.count("\n") == 1 and "found its disk full (File too large)" in done.stderr
    assert not list(tmp_path.iterdir())


# The frame


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgert", "--debug", "inspect", str(tmp_path / "absent.ert")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == FAILED
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "NotAModelError" in done.stderr.splitlines()[-2]
    assert done.stderr.splitlines()[-1].startswith("edgert: ")  # the same line as without --debug


def test_fault_of_our_own_is_one_line_that_asks_for_a_report(
    cli: Cli, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero\nin two lines")

    monkeypatch.setattr(Engine, "start", broken)
    refused(
        cli("run", tiny_file, "-p", "abc"),
        FAILED,
        "unexpected ZeroDivisionError: division by zero in two lines",
        "`edgert --debug`",
    )


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (MemoryError(), ["out of memory; give a smaller --context"]),
        (OSError(errno.EIO, "Input/output error", "model.ert"), ["model.ert: Input/output error"]),
        (edgert.EdgertError("one\nline"), ["edgert: one line"]),
    ],
)
def test_errors_of_the_system_are_one_line(
    cli: Cli, tiny_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, parts: list[str]
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "start", broken)
    refused(cli("run", tiny_file, "-p", "abc"), FAILED, *parts)
