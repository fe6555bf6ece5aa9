"""Drafts and exit heads, trained for a moment: what is learned, kept, resumed, measured and refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import edgert
from edgert.config import EngineConfig
from edgert.format import ErtFile
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import tiny_models
from tests.conftest import Outcome

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edgert.training import run as training_run  # noqa: E402
from edgert.training.draft import choose_shape  # noqa: E402
from edgert.training.exits import Head, choose_layers  # noqa: E402
from edgert.training.predictor import choose_ranks  # noqa: E402

Cli = Callable[..., Outcome]
MODEL = "llama_mqa_odd_sizes"  # three layers
QUICK = ("--rows", 4, "--row-tokens", 32, "--no-compile", "--no-half", "-t", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    tiny_models.write_folder(folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    random = np.random.default_rng(0)
    path.write_text(" ".join("".join(chr(c) for c in random.integers(97, 122, 4)) for _ in range(2000)))
    return path


def losses(done: Outcome) -> list[float]:
    """The loss that each hundredth step reported."""
    return [float(line.split(", ")[1].split()[0]) for line in done.err.splitlines() if "step" in line]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step, with a checkpoint after every step."""
    taken = training_run.Trainer._take_step

    def take(self: Any, ids: Any) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return taken(self, ids)

    monkeypatch.setattr(training_run, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_run, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(training_run.Trainer, "_take_step", take)


# ---- drafts ----------------------------------------------------------------------------------


def test_a_draft_is_a_model_of_its_own_that_learned_from_the_teacher(
    cli: Cli, folder: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "draft"
    done = cli("train", "draft", folder, "--text", text, "-o", out, "--steps", 200, "--json", *QUICK)
    assert done.status == 0, done.err
    found, (early, late) = json.loads(done.out), losses(done)
    assert late < early
    assert found["tokens"] == 1000 and 0.05 < found["agreement"] <= 1 and 0.3 < found["acceptance"] <= 1
    assert not list(tmp_path.glob("*checkpoint*"))
    record = json.loads((out / "distillation.json").read_text())
    assert (record["teacher"], record["settings"]["steps"], record["held_out"]) == ("teacher", 200, found)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    edgert.convert(out, tmp_path / "draft.ert", "f32")
    with edgert.load(tmp_path / "draft.ert", threads=1) as model:
        assert model.generate("abc", max_tokens=4).tokens
        ids = model.tokenizer.encode("hello world")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        expected = theirs(torch.tensor([ids])).logits[0].detach().numpy()
        np.testing.assert_allclose(model.logits(ids), expected, atol=5e-3)


def test_a_stopped_run_goes_on_to_the_same_draft(
    cli: Cli, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", "draft", folder, "--text", text, "--steps", 9, *QUICK)
    assert cli(*arguments, "-o", tmp_path / "whole").status == 0
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        stopped = cli(*arguments, "-o", tmp_path / "resumed")
    assert stopped.status == 130 and "the same command goes on from the last checkpoint" in stopped.err
    assert not (tmp_path / "resumed").exists() and (tmp_path / "resumed.checkpoint").exists()
    assert cli(*arguments, "-o", tmp_path / "resumed").status == 0
    a, b = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert a.read_bytes() == b.read_bytes()


def test_a_checkpoint_of_another_run_is_refused(
    cli: Cli, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", "draft", folder, "--text", text, "-o", tmp_path / "d", "--steps", 5, *QUICK)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        cli(*arguments)
    other = cli(*arguments, "--seed", 7)
    assert (other.status, other.out) == (2, "")
    assert "found one with seed 0, not 7, expected the checkpoint of this run" in other.err.splitlines()[-1]
    (tmp_path / "d.checkpoint").write_bytes(b"damaged")
    damaged = cli(*arguments)
    assert damaged.status == 2 and "d.checkpoint: found UnpicklingError in it" in damaged.err


@pytest.mark.parametrize("kind", ["draft", "exits"])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(
    kind: str, cli: Cli, folder: Path, text: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "out.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))  # the system fails longer writes
    try:
        done = cli("train", kind, folder, "--text", text, "-o", out, "--steps", 2, *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.status == 1
    assert re.search(r"edgert: \S*out\S*: cannot be written \(.+\); check", done.err.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


def test_a_draft_never_overwrites(cli: Cli, folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("mine")
    done = cli("train", "draft", folder, "--text", text, "-o", tmp_path / "d", "--steps", 1, *QUICK)
    assert done.status == 2 and "found something there, expected a new folder" in done.err


def test_shapes_follow_the_teacher_and_what_was_asked_for() -> None:
    def spec(width: int, layers: int, vocab: int) -> edgert.ModelSpec:
        return edgert.ModelSpec(
            "llama", layers, width, width // 64, width // 64, 64, 4 * width, vocab, 2048, 1e-5
        )

    chosen = choose_shape(spec(2048, 16, 32000), None, None, None)
    assert (chosen.layers, chosen.heads % chosen.kv_heads) == (5, 0)
    assert 0.07 < chosen.parameters / (16 * (4 + 12) * 2048**2 + 2 * 32000 * 2048) <= 0.1
    asked = choose_shape(spec(2048, 16, 32000), 96, 2, 100)
    assert (asked.width, asked.layers, asked.ffn, asked.heads, asked.kv_heads) == (96, 2, 100, 3, 1)
    assert choose_shape(spec(64, 2, 90000), None, None, None).width == 32  # never nothing


# ---- exits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(MODEL, "mistral_window", "qwen2_mha_window_layers", "qwen3_alternating_windows"),
        *("mixtral_gqa_tied", "olmoe_mha", "qwen2_moe_shared", "qwen3_moe_gqa_tied", "granitemoe_tied"),
    ],
)
def test_exits_of_every_architecture_compute_what_was_trained(
    name: str, cli: Cli, text: Path, tmp_path: Path
) -> None:
    """The heads in edgert's forward path give the logits that they have in torch."""
    folder, exits = tmp_path / "m", tmp_path / "e.safetensors"
    tiny_models.write_folder(folder, name)
    done = cli("train", "exits", folder, "--text", text, "-o", exits, "--steps", 3, *QUICK)
    assert done.status == 0, done.err
    assert re.findall(r"exit after 1 of [23] layers", done.out)
    edgert.convert(folder, tmp_path / "m.ert", "f32", exits=exits)
    ids = tiny_models.tokens(20)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    with ErtFile.open(tmp_path / "m.ert") as file:
        forward = Forward(Weights.of_file(file), EngineConfig(1, 64, 32))
        try:
            assert file.spec.exits in ((1,), (1, 2))
            output = model.get_output_embeddings().weight / getattr(model.config, "logits_scaling", 1)
            for layer in file.spec.exits:
                head = Head(output, model.model.norm.weight, file.spec.norm_eps)
                head.load_state_dict(_tensors(exits, layer))
                expected = head(hidden[layer])[0].detach().numpy()
                found = forward.run(ids, layers=(0, layer), outputs=range(20))
                np.testing.assert_allclose(found, expected, atol=2e-3)
                forward.cache.rewind(0)
        finally:
            forward.close()


def _tensors(exits: Path, layer: int) -> dict[str, Any]:
    found, names = load_file(exits), ("norm", "matrix", "output_norm")
    return {name: torch.from_numpy(found[f"exits.{layer}.{name}"]).float() for name in names}


def test_exits_learn_and_are_counted_on_text_of_their_own(
    cli: Cli, folder: Path, text: Path, tmp_path: Path
) -> None:
    exits = tmp_path / "e.safetensors"
    done = cli(
        *(
            "train",
            "exits",
            folder,
            "--text",
            text,
            "-o",
            exits,
            "--layers",
            "2",
            "--steps",
            200,
            "--json",
            *QUICK,
        )
    )
    assert done.status == 0, done.err
    (found,), (early, late) = json.loads(done.out).values(), losses(done)
    assert late < early
    assert sum(found["tokens"]) == 500  # half of the held-out tokens; the temperature has the other
    assert sum(found["agreed"]) / sum(found["tokens"]) > 0.5  # two of three layers of a nearly linear model
    assert not list(tmp_path.glob("*checkpoint*"))


def test_stopped_exits_go_on_to_the_same_heads(
    cli: Cli, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", "exits", folder, "--text", text, "--steps", 6, *QUICK)
    assert cli(*arguments, "-o", tmp_path / "whole.safetensors").status == 0
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        assert cli(*arguments, "-o", tmp_path / "resumed.safetensors").status == 130
    assert cli(*arguments, "-o", tmp_path / "resumed.safetensors").status == 0
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_layers_are_thirds_or_what_was_asked_for() -> None:
    def spec(layers: int) -> edgert.ModelSpec:
        return edgert.ModelSpec("llama", layers, 8, 1, 1, 8, 8, 9, 9, 1e-5)

    assert choose_layers(spec(8), None) == (3, 5)
    assert choose_layers(spec(32), None) == (11, 21)
    assert choose_layers(spec(2), None) == (1,)
    assert choose_layers(spec(1), None) == ()
    assert choose_layers(spec(8), "6,2") == (2, 6)


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "3"), "--layers is '3'; expected numbers from 1 to 2"),
        (("--layers", "a"), "--layers is 'a'; expected numbers"),
        (("--rate", "2"), "--rate is 2.0; expected a number between 0 and 1"),
        (("--row-tokens", "65"), "--row-tokens is 65; expected 8 to the model's context of 64"),
        (("--minutes", "0"), "--minutes is 0.0; expected more than 0"),
        (("--device", "tpu"), "device is 'tpu', which torch cannot use here; expected cpu"),
        (("-o", "heads.bin"), "expected a name that ends in .safetensors"),
        (("--text", "absent.txt"), "absent.txt: No such file or directory"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    options: tuple[str, ...], message: str, cli: Cli, folder: Path, text: Path, tmp_path: Path
) -> None:
    done = cli(
        *("train", "exits", folder, "--text", text, "-o", tmp_path / "e.safetensors", "--steps", 1, *QUICK),
        *options,
    )
    assert done.status == 2 and done.err.count("\n") == 1 and message in done.err, done.err


def test_a_folder_without_a_tokenizer_is_refused(cli: Cli, text: Path, tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "m", MODEL)
    (tmp_path / "m" / "tokenizer.json").unlink()
    done = cli("train", "draft", tmp_path / "m", "--text", text, "-o", tmp_path / "d", *QUICK)
    assert done.status == 1 and done.err.count("\n") == 1 and "found no tokenizer.json" in done.err


# ---- predictors ------------------------------------------------------------------------------


def test_predictors_find_what_fires_and_the_file_does_as_they_say(
    cli: Cli, text: Path, tmp_path: Path
) -> None:
    """Of a rank above the width, which is a copy of the gate: it expects what fires and hardly more."""
    out, sparse = tmp_path / "p.safetensors", tmp_path / "model"
    tiny_models.write_folder(sparse, "llama_relu2")
    options = ("--rank", 64, "--recall", 0.9, "--steps", 20, "--every-layer", "--json", *QUICK)
    done = cli("train", "predictor", sparse, "--text", text, "-o", out, *options)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert all(found["ranks"]) and not list(tmp_path.glob("*checkpoint*"))
    for recall, firing, predicted in zip(found["recall"], found["firing"], found["predicted"], strict=True):
        assert recall == pytest.approx(0.9, abs=0.05)  # on other documents
        assert 0.3 < firing < 0.7 and predicted == pytest.approx(0.9 * firing, abs=0.1)
    whole, predicted = found["perplexity"]
    assert whole > 1 and predicted != whole
    edgert.convert(sparse, tmp_path / "m.ert", "q8", predictor=out)
    ids = tiny_models.tokens(40)
    with ErtFile.open(tmp_path / "m.ert") as file:
        assert list(file.spec.predictors) == found["ranks"]
        config = EngineConfig(1, 64, 32, predict=True)
        forward = Forward(Weights.of_file(file), config)
        try:
            forward.whole = 0
            for token in ids:
                forward.run([token])
            read, of = forward.gated
        finally:
            forward.close()
    assert read / of == pytest.approx(np.mean(found["predicted"]), abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recall", "1"), "--recall is 1.0; expected a share"),
        (("--rank", "8"), "--rank is 8; expected 32 to"),
        (("-o", "p.bin"), "expected a name that ends in .safetensors"),
        (("--recall", "0.999"), "found no layer in which predicting pays"),
    ],
)
def test_predictors_that_cannot_be_are_refused(
    options: tuple[str, ...], message: str, cli: Cli, text: Path, tmp_path: Path
) -> None:
    tiny_models.write_folder(tmp_path / "m", "llama_relu2")  # half of its neurons fire
    arguments = ("train", "predictor", tmp_path / "m", "--text", text, "-o", tmp_path / "p.safetensors")
    done = cli(*arguments, "--steps", 1, *QUICK, *options)
    assert done.status == 2 and done.err.count("\n") == 1 and message in done.err, done.err


def test_a_model_without_relu_has_no_use_for_predictors(
    cli: Cli, folder: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.safetensors"
    done = cli("train", "predictor", folder, "--text", text, "-o", out, "--steps", 1, *QUICK)
    assert done.status == 2 and "has no use for predictors; expected gates with relu" in done.err, done.err


def test_ranks_follow_what_fires() -> None:
    spec = edgert.ModelSpec("llama", 3, 512, 8, 8, 64, 1024, 9, 9, 1e-5, "relu")
    assert choose_ranks(spec, None, [0.1, 0.2, 0.3]) == (32, 64, 96)
    assert choose_ranks(spec, 128, [0.1, 0.1, 1.6]) == (32, 32, 256)
