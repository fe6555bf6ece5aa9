"""What rounding a tensor costs, measured; and conversions under a budget of bits."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.calibration.convert import TextCalibration
from edgert.calibration.sensitivity import Sensitivity
from edgert.converters.quantize import quantize
from edgert.errors import OptionError
from edgert.format import ErtFile
from edgert.kernels import packing
from tests import tiny_models

LETTERS = "abc defghij. klm nopq rstuvw xyz ABC DEF"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    lines = (json.dumps({"text": LETTERS[i:] + LETTERS[:i]}) + "\n" for i in range(8))
    path.write_text("".join(lines))
    return path


@pytest.fixture(params=["llama_head_dim", "mixtral_window_odd_sizes"], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    tiny_models.write_folder(path, request.param)
    return path


@pytest.fixture
def q8(folder: Path, tmp_path: Path) -> Iterator[ErtFile]:
    edgert.convert(folder, tmp_path / "q8.ert", "q8")
    with ErtFile.open(tmp_path / "q8.ert") as file:
        yield file


def likely(path: Path, ids: list[int]) -> Any:
    with edgert.load(path, threads=1) as model:
        logits = model.logits(ids).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.compiled
def test_the_loss_is_the_divergence_of_a_model_with_that_tensor_rounded(
    q8: ErtFile, text: Path, tmp_path: Path
) -> None:
    """The last layer's v has no Gram matrix here, so what it becomes is known: q3, by the plain search."""

    class Blind:
        def gram(self, name: str) -> None:
            return None

        def rows(self, name: str) -> int:
            return 0

    before = q8.path.read_bytes()
    with closing(TextCalibration(q8, text)) as calibration:
        config, windows = calibration.config, calibration.text.windows
    with closing(Sensitivity(q8, config, windows)) as measured:
        losses = measured.losses(Blind())
    assert q8.path.read_bytes() == before
    name = "layers.1.v"
    tensor = q8.tensors[name]
    data = bytearray(before)
    stored = np.frombuffer(data, np.uint8)[tensor.offset : tensor.offset + tensor.nbytes]
    rows, columns = tensor.shape
    rounded = quantize(packing.unpack("q8", stored, rows, columns), "q3").floats()
    codes = quantize(rounded, "q8")
    data[tensor.offset : tensor.offset + tensor.nbytes] = packing.pack(
        "q8", codes.values, codes.scales.astype(np.float16)
    ).tobytes()
    changed = tmp_path / "changed.ert"
    changed.write_bytes(data)
    divergences = []
    for window in windows:
        p, q = likely(q8.path, list(window)), likely(changed, list(window))
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
    expected = float(np.concatenate(divergences).mean())
    assert losses[name]["q3"] == pytest.approx(expected, rel=0.02)
    for of_tensor in losses.values():
        assert of_tensor["q8"] < of_tensor["q4"] < of_tensor["q3"] < of_tensor["q2"] or not any(
            of_tensor.values()
        )


@pytest.mark.compiled
def test_a_budget_is_kept_and_no_worse_than_one_type_of_that_size(
    folder: Path, q8: ErtFile, text: Path, tmp_path: Path
) -> None:
    one = edgert.convert(folder, tmp_path / "one.ert", "q3", calibrate=text, sparsity="none")
    bits = one.bits_per_weight
    report = edgert.convert(folder, tmp_path / "m.ert", calibrate=text, bits=bits)
    assert bits - 0.3 < report.bits_per_weight <= bits
    assert len({t.quant for t in report.tensors} - {"f32"}) > 1
    ids = list(range(3, 40))
    p = likely(q8.path, ids)
    divergence = [
        float((np.exp(p) * (p - likely(path, ids))).sum(axis=1).mean()) for path in (report.path, one.path)
    ]
    # Random weights are all alike: there is little to gain, but nothing to lose.
    assert divergence[0] < 1.1 * divergence[1]


@pytest.mark.compiled
def test_the_embedding_keeps_the_type_it_is_given(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    report = edgert.convert(tiny_folder, tmp_path / "m.ert", calibrate=text, bits=4.9, embedding="q8")
    assert report.tensors[0].name == "token_embedding"
    assert report.tensors[0].quant == "q8"
    assert report.bits_per_weight <= 4.9


def test_bits_that_make_no_sense_are_refused(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.ert"
    for options, message in (
        ({"bits": 4.0}, "expected a text to measure on"),
        ({"bits": 0.0, "calibrate": text}, "expected a number above 0"),
        ({"bits": 4.0, "calibrate": text, "quant": "q4"}, "both say how matrices are stored"),
        ({"bits": 4.0, "calibrate": text, "sparsity": "exact"}, "neurons one by one have one type"),
        ({"embedding": "q8"}, "expected quant=QuantSpec"),
    ):
        with pytest.raises(OptionError, match=message):
            edgert.convert(tiny_folder, out, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.compiled
def test_too_few_bits_are_refused_with_the_least(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give more bits"):
        edgert.convert(tiny_folder, tmp_path / "m.ert", calibrate=text, bits=2.0)
    assert not list(tmp_path.iterdir())


def test_a_plan_writes_nothing_and_tells_what_would_be(
    cli: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.ert"
    options = ("convert", tiny_folder, "-o", out, "--quant", "q3", "--embeddings", "q8")
    planned = json.loads(cli(*options, "--dry-run", "--json").out)
    assert not out.exists()
    shown = cli(*options, "--dry-run").out
    assert "would be" in shown and "to run:" in shown and "%" not in shown
    written = json.loads(cli(*options, "--json").out)
    assert planned["file_bytes"] == written["file_bytes"] == out.stat().st_size
    assert planned["bits_per_weight"] == written["bits_per_weight"]
    assert [t["quant"] for t in planned["tensors"]] == [t["quant"] for t in written["tensors"]]
    assert planned["tensors"][0]["quant"] == "q8"


def test_options_that_do_not_go_together_on_the_command_line(
    cli: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    halves = f"{tmp_path}/a.ert,{tmp_path}/b.ert"
    for more in (["--dry-run"], ["--bits", 4], ["--embeddings", "q8"]):
        refused = cli("convert", tiny_folder, "-o", halves, "--split", 1, *more)
        assert (refused.status, "do not go with --split" in refused.err) == (2, True)
    refused = cli("convert", tiny_folder, "-o", tmp_path / "m.ert", "--embeddings", "q8")
    assert (refused.status, "give --quant or --bits" in refused.err) == (2, True)
