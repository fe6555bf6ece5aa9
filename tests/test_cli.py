"""The command: every verb does its work, and says it in the promised shape."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import edgert
from edgert.cli.main import command
from edgert.engine import Engine
from tests import tiny_models

Cli = Callable[..., Any]
PROMPT = "Once upon"
EDGERT = [sys.executable, "-m", "edgert"]
FILE_VERBS = ("convert", "inspect", "verify", "run", "chat", "bench", "eval")
VERBS = (*FILE_VERBS, "probe", "doctor", "warmup", "train", "cloud", "certs", "calibrate", "demo")
TIMING = re.compile(
    r"\[load \d+\.\d\d s \| prompt (\d+) tokens, [\d.]+ tok/s \| first token \d+ ms \| "
    r"(\d+) tokens, [\d.]+ tok/s \| (\w+)\]\n"
)
# Slow enough that a signal finds it at work, whatever the machine.
SLOW = os.environ | {"NUMBA_DISABLE_JIT": "1"}


def keys(value: Any) -> Any:
    """The names of an object and of the objects in it, with the type of everything else."""
    if isinstance(value, dict):
        return {name: keys(inner) for name, inner in value.items()}
    return type(value).__name__


# Help


def test_help_names_every_verb(cli: Cli) -> None:
    done = cli("--help")
    assert done.status == 0 and not done.err
    assert done.out.startswith("Usage: edgert [OPTIONS] COMMAND [ARGS]...")
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", done.out, re.MULTILINE)
    assert tuple(listed) == VERBS


def test_no_arguments_show_the_help(cli: Cli) -> None:
    assert cli() == cli("--help")
    assert cli("-h") == cli("--help")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_readable_help(cli: Cli, verb: str) -> None:
    done = cli(verb, "--help")
    assert done.status == 0 and not done.err
    assert done.out.startswith(f"Usage: edgert {verb} ")
    assert max(map(len, done.out.splitlines())) <= 100
    assert ("Commands:" in done.out) == (verb == "train")


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    found = command.get_command(click.Context(command), verb)
    assert found is not None and found.help
    silent = [param.opts for param in found.params if isinstance(param, click.Option) and not param.help]
    assert not silent


def test_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version") == (0, f"edgert {edgert.__version__}\n", "")


def test_module_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("edgert")
    if not script.exists():
        pytest.skip("edgert is not installed beside this Python")
    for arguments in (["--help"], ["run"]):
        found = [
            subprocess.run([*command, *arguments], capture_output=True, text=True)
            for command in ([script], EDGERT)
        ]
        assert found[0].stdout == found[1].stdout
        assert found[0].stderr == found[1].stderr
        assert found[0].returncode == found[1].returncode


# run


def test_run_streams_the_text_and_times_it(cli: Cli, tiny: edgert.Model, tiny_file: Path) -> None:
    expected = tiny.generate(PROMPT, max_tokens=12).text
    done = cli("run", tiny_file, "-p", PROMPT, "-n", 12)
    assert (done.status, done.out) == (0, expected + "\n")
    timing = TIMING.fullmatch(done.err)
    assert timing and timing.groups() == (str(len(PROMPT)), "12", "length")


def test_run_reads_the_prompt_from_standard_input(cli: Cli, tiny: edgert.Model, tiny_file: Path) -> None:
    expected = tiny.generate(PROMPT, max_tokens=5).text
    assert cli("run", tiny_file, "-n", 5, stdin=PROMPT).out == expected + "\n"


def test_run_passes_every_option_on(cli: Cli, tiny: edgert.Model, tiny_file: Path) -> None:
    sampling = {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 9}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.5}
    expected = tiny.generate(PROMPT, max_tokens=20, **sampling, **penalties).text
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (sampling | penalties).items()]
    engine = ["-t", 2, "-c", 40, "--chunk", 5, "--kv", "f16", "--ram", "4GiB"]
    assert cli("run", tiny_file, "-p", PROMPT, "-n", 20, *options, *engine).out == expected + "\n"
    stop = expected[3:5]
    cut = cli("run", tiny_file, "-p", PROMPT, "-n", 20, *options, "--stop", "\x7f", "--stop", stop)
    assert cut.out == expected[: expected.index(stop)] + "\n"
    assert cut.err.endswith("| stop]\n")


def test_run_json_has_the_documented_shape(cli: Cli, tiny: edgert.Model, tiny_file: Path) -> None:
    done = cli("run", tiny_file, "-p", PROMPT, "-n", 6, "--json", "-t", 1)
    expected = tiny.generate(PROMPT, max_tokens=6)
    assert (done.status, done.err, done.out.count("\n")) == (0, "", 1)
    found = json.loads(done.out)
    stats = found.pop("stats")
    assert keys(found) == {
        "text": "str",
        "tokens": "list",
        "prompt_tokens": "int",
        "finish_reason": "str",
        "timings": dict.fromkeys(("load_s", "first_token_s", "prefill_tok_s", "decode_tok_s"), "float"),
        "memory": {"peak_rss_bytes": "int"},
    }
    assert (found["text"], found["tokens"]) == (expected.text, list(expected.tokens))
    assert (found["prompt_tokens"], found["finish_reason"]) == (len(PROMPT), "length")
    assert found["memory"]["peak_rss_bytes"] > 10 << 20
    assert stats["threads"] == 1


def test_run_of_no_tokens_prints_an_empty_line(cli: Cli, tiny_file: Path) -> None:
    done = cli("run", tiny_file, "-p", PROMPT, "-n", 0)
    assert (done.status, done.out) == (0, "\n")


# Interruptions


def test_interrupt_keeps_the_text_so_far(tiny: edgert.Model, tiny_file: Path) -> None:
    expected = tiny.generate(PROMPT, max_tokens=50).text
    arguments = ["run", str(tiny_file), "-p", PROMPT, "-n", "50"]
    with subprocess.Popen(
        [*EDGERT, *arguments], env=SLOW, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    text = (first + rest).decode()
    assert process.returncode == 130
    assert text.endswith("\n") and expected.startswith(text[:-1]) and len(text) > 3
    timing = TIMING.fullmatch(errors.decode())
    assert timing and timing[3] == "interrupted"


def test_interrupt_with_json_still_gives_an_object(
    cli: Cli, tiny: edgert.Model, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny.generate(PROMPT, max_tokens=4)
    step, count = Engine.step, iter(range(100))

    def step_with_a_signal(engine: Engine) -> object:
        if next(count) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_with_a_signal)
    done = cli("run", tiny_file, "-p", PROMPT, "-n", 20, "--json")
    assert (done.status, done.err) == (130, "")
    found = json.loads(done.out)
    assert found["finish_reason"] == "interrupted"
    assert (found["text"], found["tokens"]) == (expected.text, list(expected.tokens))


def test_interrupt_while_loading_is_one_line(
    cli: Cli, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Engine, "__init__", interrupted)
    done = cli("run", tiny_file, "-p", PROMPT)
    assert (done.status, done.out, done.err.strip()) == (130, "", "edgert: interrupted")


def test_closed_pipe_ends_quietly(tiny_file: Path) -> None:
    arguments = ["run", str(tiny_file), "-p", PROMPT, "-n", "50"]
    with subprocess.Popen(
        [*EDGERT, *arguments], env=SLOW, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(1)) == 1
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert errors == b""
    assert process.returncode == 1


# chat


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    tiny_models.write_folder(tmp_path / "chat", "llama_head_dim")
    template = "{% for m in messages %}{{ m.role[0] + m.content + '|' }}{% endfor %}"
    config = json.dumps({"chat_template": template})
    (tmp_path / "chat" / "tokenizer_config.json").write_text(config, encoding="utf-8")
    edgert.convert(tmp_path / "chat", tmp_path / "chat.ert", quant="f32")
    return tmp_path / "chat.ert"


def test_chat_answers_every_line_with_the_conversation_before_it(cli: Cli, chat_file: Path) -> None:
    with edgert.load(chat_file, threads=1) as model:
        first = model.generate("sBrief|uHi|", max_tokens=4).text
        second = model.generate(f"sBrief|uHi|a{first}|uBye|", max_tokens=4).text
    done = cli("chat", chat_file, "--system", "Brief", "-n", 4, "-t", 1, stdin="Hi\nBye\n")
    assert (done.status, done.out) == (0, f"{first}\n{second}\n")
    assert done.err.count("tok/s") == 4  # two timing lines, two rates each


def test_interrupt_ends_an_answer_but_not_the_chat(
    cli: Cli, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = Engine.step, iter(range(100))

    def step_with_a_signal(engine: Engine) -> object:
        if next(count) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_with_a_signal)
    done = cli("chat", chat_file, "-n", 4, stdin="Hi\nBye\n")
    assert done.status == 0
    reasons = re.findall(r"(\w+)\]$", done.err, re.MULTILINE)
    assert reasons == ["interrupted", "length"]


# Files


def test_convert_prints_a_table_and_writes_the_file(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ert"
    done = cli("convert", tiny_folder, "-o", out)
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "from", "type", "size", "error"]
    assert re.fullmatch(r"token_embedding +96 x 40 +F32 +q4 +[\d.]+ KiB +\d\.\d\d%", lines[1])
    assert re.fullmatch(re.escape(str(out)) + r": [\d.]+ KiB, [\d.]+ bits per weight, \d+\.\d s", lines[-1])
    assert re.fullmatch(r" +\d+ tensors +F32 -> q4 +rounded, error up to \d+\.\d\d%", lines[-3])
    assert re.fullmatch(r" +\d+ tensors +F32 -> f32 +exact", lines[-2])
    with edgert.load(out) as model:
        assert model.spec.vocab == 96


def test_convert_json_is_the_whole_report(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ert"
    done = cli("convert", tiny_folder, "-o", out, "--quant", "q8", "--json")
    assert (done.status, done.err) == (0, "")
    report = json.loads(done.out)
    assert report.pop("spec")["layers"] == 2
    assert keys(report) == {
        "path": "str",
        "tensors": "list",
        "bits_per_weight": "float",
        "file_bytes": "int",
        "seconds": "float",
        "peak_rss_bytes": "int",
    }
    assert (report["path"], report["file_bytes"]) == (str(out), out.stat().st_size)
    assert report["tensors"][0]["name"] == "token_embedding"
    expected = {"name", "shape", "source_type", "quant", "nbytes", "relative_error"}
    assert set(report["tensors"][0]) == expected


def test_inspect_shows_the_model(cli: Cli, tiny_file: Path) -> None:
    done = cli("inspect", tiny_file)
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^  architecture +llama$", done.out, re.MULTILINE)
    assert re.search(r"^  layers\.1\.down +40 x 88 +f32 +[\d.]+ KiB$", done.out, re.MULTILINE)


def test_inspect_json_has_the_model_and_its_tensors(cli: Cli, tiny: edgert.Model, tiny_file: Path) -> None:
    found = json.loads(cli("inspect", tiny_file, "--json").out)
    told = {"exits", "sparsity", "predictors", "inputs"}  # by calibration or training, where there was one
    assert set(found) == {"size_bytes", "spec", "metadata", "tensors"} | told
    assert found["size_bytes"] == tiny_file.stat().st_size
    assert edgert.ModelSpec.from_json(found["spec"]) == tiny.spec
    assert found["metadata"]["source"] == "tiny-folder"
    assert {"name", "role", "shape", "quant", "layout", "offset", "nbytes", "sha256"} == set(
        found["tensors"][0]
    )


def test_verify_finds_a_whole_file_whole(cli: Cli, tiny_file: Path) -> None:
    done = cli("verify", tiny_file)
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r".*tiny\.ert: all \d+ tensors are intact\n", done.out)


def test_checksums_can_be_compared_before_a_run(cli: Cli, tiny_file: Path) -> None:
    options = (tiny_file, "-p", PROMPT, "-n", 3)
    assert cli("run", *options, "--check-tensors").out == cli("run", *options).out


# Measuring


def test_bench_prints_the_columns_of_llama_bench(cli: Cli, tiny_file: Path) -> None:
    done = cli("bench", tiny_file, "-p", 6, "-n", 2, "-r", 2, "-t", 1)
    assert (done.status, done.err) == (0, "")
    head, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines()]
    assert head == ["model", "size", "params", "threads", "test", "t/s"]
    assert [cell.endswith(":") for cell in rule] == [False, False, True, True, True, True]
    assert [row[4] for row in rows] == ["pp6", "tg2"]
    for row in rows:
        assert row[0] == "llama tiny" and row[3] == "1"
        assert re.fullmatch(r"[\d.]+ KiB", row[1]) and re.fullmatch(r"[\d.]+ M", row[2])
        assert re.fullmatch(r"[\d.]+ ± [\d.]+", row[5])
    assert len({len(line) for line in done.out.splitlines()}) == 1  # the columns are straight


def test_bench_json_is_a_list_of_tests(cli: Cli, tiny_file: Path) -> None:
    found = json.loads(cli("bench", tiny_file, "-p", 4, "-n", 2, "-d", 3, "-r", 1, "-o", "json").out)
    assert [row["test"] for row in found] == ["pp4@d3", "tg2@d3"]
    for row in found:
        assert keys(row) == {
            "model": "str",
            "size_bytes": "int",
            "params": "int",
            "threads": "int",
            "test": "str",
            "ts_mean": "float",
            "ts_sd": "float",
        }
        assert row["ts_mean"] > 0 and row["ts_sd"] == 0


def test_bench_leaves_out_a_test_of_no_tokens(cli: Cli, tiny_file: Path) -> None:
    found = json.loads(cli("bench", tiny_file, "-p", 0, "-n", 1, "-r", 1, "-o", "json").out)
    assert [row["test"] for row in found] == ["tg1"]


def test_eval_gives_perplexity_and_bits_per_byte(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A cat sat.", encoding="utf-8")
    done = cli("eval", tiny_file, "--text", text)
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(
        r"perplexity [\d.]+, [\d.]+ bits per byte \(9 tokens, 10 bytes, 1 documents\)\n", done.out
    )
    found = json.loads(cli("eval", tiny_file, "--text", text, "--json").out)
    assert keys(found) == {
        "perplexity": "float",
        "bits_per_byte": "float",
        "tokens": "int",
        "bytes": "int",
        "documents": "int",
    }


# This machine


def test_doctor_says_what_there_is(cli: Cli) -> None:
    done = cli("doctor")
    assert (done.status, done.err) == (0, "")
    named = [line.split()[0] for line in done.out.splitlines()]
    assert named[:6] == ["edgert", "libraries", "cpu", "kernels", "cache", "tiling"]
    assert set(named[6:]) <= {"flash", "problem"}


def test_doctor_names_a_cache_that_cannot_be_kept(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    environment = os.environ | {"EDGERT_CACHE_DIR": str(blocked)}
    done = subprocess.run([*EDGERT, "doctor"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"not kept ({blocked}/" in done.stdout
    assert "problem     compiled kernels cannot be kept" in done.stdout


@pytest.mark.compiled
def test_probe_json_has_a_figure_per_thread(cli: Cli) -> None:
    done = cli("probe", "-t", 1, "--json")
    assert (done.status, done.err) == (0, "")
    found = json.loads(done.out)
    assert len(found["stream_gb_s"]) == len(found["q4_gop_s"]) == 1
    assert found["stream_gb_s"][0] > 0


@pytest.mark.compiled
def test_warmup_says_when_the_kernels_are_ready(cli: Cli) -> None:
    done = cli("warmup", "--no-search")
    assert (done.status, done.err) == (0, "")
    assert re.match(r"kernels ready in \d+\.\d s; cache: .+\n", done.out)
