"""Thresholds for activations: found in a text, kept in the file, and made up for by verification."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.calibration.cost import sparsity_cost
from edgert.calibration.firing import Firings
from edgert.config import ACTIVATIONS
from edgert.errors import FormatError, OptionError
from edgert.format import ErtFile
from edgert.format.sparsity import QUANTILES, read_sparsity
from edgert.kernels.reference.activation import activated
from tests import kernel_inputs as inputs
from tests import tiny_models

TEXT = "the cat sat on the mat and the dog ran to the cat " * 30


@pytest.fixture(scope="module")
def silu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with SiLU, converted to 60% zeros; the text beside it."""
    folder = tmp_path_factory.mktemp("silu")
    tiny_models.write_folder(folder / "model", "llama_gqa_tied")
    (folder / "text.txt").write_text(TEXT)
    edgert.convert(folder / "model", folder / "m.ert", "q8", sparsity=0.6, calibrate=folder / "text.txt")
    return folder


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_thresholds_leave_the_share_that_was_asked_for(kind: Any) -> None:
    rows = inputs.floats("gates", "plain", 200, 48) * np.float32(4)
    firings = Firings(kind)
    firings.see_gates(0, rows[:150])
    firings.see_gates(0, rows[150:])
    size = np.abs(activated(ACTIVATIONS.index(kind), rows.reshape(-1)))
    own = float((size == 0).mean())
    for share in (0.0, 0.3, 0.7, 0.9):
        found = firings.result(share)
        assert found is not None
        zeros = float((size < found.threshold).mean()) if found.threshold else own
        assert found.zeros == pytest.approx(zeros, abs=2e-3)
        assert zeros == pytest.approx(max(share, own), abs=0.03)
    often = (size.reshape(rows.shape) > 0).mean(axis=0)
    assert np.allclose(found.quantiles, np.quantile(often, QUANTILES), atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.6, "core:0.5"])
def test_a_plan_of_a_share_has_the_size_of_the_file(silu: Path, tmp_path: Path, sparsity: Any) -> None:
    given = {"sparsity": sparsity, "calibrate": silu / "text.txt", "dry_run": True}
    planned = edgert.convert(silu / "model", tmp_path / "m.ert", "q8", **given)
    assert not (tmp_path / "m.ert").exists()
    if sparsity == 0.6:
        with ErtFile.open(silu / "m.ert") as file:
            made = {t.name: (t.quant, t.nbytes) for t in file.tensors.values() if t.role != "bytes"}
        assert {t.name: (t.quant, t.nbytes) for t in planned.tensors} == made
    with pytest.raises(OptionError, match="needs a text"):
        edgert.convert(silu / "model", tmp_path / "m.ert", "q8", sparsity=sparsity, dry_run=True)


def test_the_hottest_neurons_come_first(tmp_path: Path) -> None:
    firings = Firings("relu")
    rows = np.full((10, 5), -1, np.float32)
    for neuron, count in enumerate((3, 10, 0, 7, 7)):
        rows[:count, neuron] = 0.5
    firings.see_gates(0, rows)
    found = firings.result(0)
    assert found is not None
    assert found.hottest.tolist() == [1, 3, 4, 0, 2]
    assert Firings("relu").result(0) is None


def test_order_changes_only_the_rounding(tmp_path: Path) -> None:
    """Neurons hottest first: the same function of the weights, quantised in other groups."""
    tiny_models.write_folder(tmp_path / "model", "llama_relu2")
    (tmp_path / "text.txt").write_text(TEXT)
    tokens = [1, 5, 7, 9, 11, 20]
    found = []
    for calibrate in (None, tmp_path / "text.txt"):
        edgert.convert(tmp_path / "model", tmp_path / "m.ert", "q8", sparsity="exact", calibrate=calibrate)
        with ErtFile.open(tmp_path / "m.ert") as file:
            assert file.spec.neurons
            assert (file.sparsity is not None) == (calibrate is not None)
            if file.sparsity is not None:
                assert file.sparsity.share == 0
                assert not any(file.sparsity.thresholds)
                assert all(0.2 < zeros < 0.8 for zeros in file.sparsity.zeros)
        with edgert.load(tmp_path / "m.ert", threads=1) as model:
            found.append(model.logits(tokens))
    assert np.allclose(*found, atol=0.05 * np.abs(found[0]).max())
    assert not np.array_equal(*found)


def test_thresholds_apply_unless_they_are_refused(silu: Path) -> None:
    tokens = [int(t) for t in inputs.whole("tokens", 0, 60, 40)]
    with ErtFile.open(silu / "m.ert") as file:
        assert file.sparsity is not None
        assert file.sparsity.share == 0.6
        assert all(0.5 < zeros < 0.7 for zeros in file.sparsity.zeros)
    found = {}
    for sparsity in ("auto", "none"):
        with edgert.load(silu / "m.ert", threads=1, sparsity=sparsity) as model:  # type: ignore[arg-type]
            found[sparsity] = model.logits(tokens)
    assert np.array_equal(found["auto"][:16], found["none"][:16])  # the start is computed whole
    assert not np.array_equal(found["auto"][16:], found["none"][16:])
    with pytest.raises(OptionError, match="sparsity is 'some'"):
        edgert.load(silu / "m.ert", sparsity="some")  # type: ignore[arg-type]


def test_a_sparse_draft_gives_what_the_whole_model_gives(silu: Path) -> None:
    prompt = [int(t) for t in inputs.whole("prompt", 0, 60, 18)]
    with edgert.load(silu / "m.ert", threads=1, sparsity="none") as model:
        plain = model.generate(prompt, max_tokens=40, temperature=1.2, seed=3).tokens
    with edgert.load(silu / "m.ert", threads=1) as model:
        approximate = model.generate(prompt, max_tokens=40, temperature=1.2, seed=3).tokens
    with edgert.load(silu / "m.ert", threads=1, draft="sparse") as model:
        done = model.generate(prompt, max_tokens=40, temperature=1.2, seed=3)
    assert done.tokens == plain
    assert done.stats["drafted"] > 0
    assert approximate != plain


def test_its_cost_is_measured(silu: Path) -> None:
    cost = sparsity_cost(silu / "m.ert", silu / "text.txt")
    assert cost.whole != cost.sparse
    assert "->" in str(cost)


def test_what_does_not_fit_is_refused(silu: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs a text"):
        edgert.convert(silu / "model", tmp_path / "m.ert", "q8", sparsity=0.4)
    with pytest.raises(OptionError, match=r"sparsity is 1.5; expected a share"):
        edgert.convert(silu / "model", tmp_path / "m.ert", "q8", sparsity=1.5, calibrate=silu / "text.txt")
    with pytest.raises(OptionError, match="has no thresholds"):
        edgert.convert(silu / "model", tmp_path / "m.ert", "q8")
        edgert.load(tmp_path / "m.ert", draft="sparse")


def test_the_command_says_what_it_cost(silu: Path, tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "m.ert"
    arguments = (silu / "model", "-o", out, "--quant", "q8", "--calibrate", silu / "text.txt")
    done = cli("convert", *arguments, "--sparsity", "0.5")
    assert done.status == 0
    assert "50% of the activations taken for zero: perplexity" in done.out
    assert "zero activations, 50% wanted" in cli("inspect", out).out
    assert json.loads(cli("inspect", out, "--json").out)["sparsity"]["share"] == 0.5
    assert cli("convert", *arguments, "--sparsity", "much").status == 2


GOOD: dict[str, Any] = {
    "share": 0.5,
    "thresholds": [0.1, 0],
    "zeros": [0.5, 0.4],
    "firing": [[0, 0, 0, 0.5, 1]] * 2,
}


def test_a_calibration_is_read_as_it_was_written() -> None:
    found = read_sparsity(json.dumps(GOOD), 2)
    assert found is not None
    assert json.loads(json.dumps(found.to_json())) == GOOD
    assert read_sparsity(None, 2) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 1},
        {"share": -0.1},
        {"share": "half"},
        {"share": True},
        {"thresholds": [0.1]},
        {"thresholds": [0.1, -1]},
        {"thresholds": [0.1, 1e31]},
        {"zeros": [0.5, 1.5]},
        {"zeros": "many"},
        {"firing": [[0, 0, 0, 0, 1]]},
        {"firing": [[0, 0, 0, 0], [0, 0, 0, 0, 1]]},
        {"firing": [[0, 0, 0, 0, None], [0, 0, 0, 0, 1]]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_calibration_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="F32 sparsity"):
        read_sparsity(json.dumps(GOOD | wrong), 2)
