"""Outlier columns apart: the same products, found where they are, checked when a file is opened."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

import edgert
from edgert.config import ModelSpec, QuantSpec
from edgert.errors import FormatError, OptionError
from edgert.format import ErtFile
from edgert.kernels import columns
from edgert.kernels.reference import columns as twin
from tests import kernel_inputs as inputs
from tests import tiny_models

COUNT = 32
PLANTED = (3, 17, 40)
"""Features of the residual stream that are made large."""
TIMES = 40.0
TOKENS = [1, 5, 9, 22, 41, 3, 7, 60, 30, 31, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
CONFIG = tiny_models.CONFIGS["llama_gqa_tied"] | {
    "hidden_size": 96,
    "intermediate_size": 160,
    "head_dim": 24,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model some of whose normed features are large, and the columns that meet them small: a usual one."""
    made = tmp_path_factory.mktemp("outliers") / "planted"
    tensors = tiny_models.weights(CONFIG, tiny_models.SEED)
    for name, values in tensors.items():
        if name.endswith("layernorm.weight"):
            values[list(PLANTED)] *= TIMES
        elif name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            values[:, list(PLANTED)] /= TIMES
    tiny_models.write_model(made, CONFIG, tensors)
    lines = ("the quick brown fox jumps over the lazy dog", "0123456789 (a + b) / 2 = c; what else?")
    (made.parent / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines * 4))
    return made


@pytest.fixture(scope="module")
def q4_file(folder: Path) -> Path:
    return converted(folder, folder.parent / "q4.ert", "q4", COUNT)


def converted(folder: Path, out: Path, quant: str, outliers: int) -> Path:
    text = folder.parent / "text.jsonl"
    return edgert.convert(folder, out, quant, calibrate=text, outliers=outliers).path  # type: ignore[arg-type]


def logits(path: Path, threads: int = 1, chunk: int | None = None) -> NDArray[np.float32]:
    with edgert.load(path, threads=threads, chunk=chunk) as model:
        return model.logits(TOKENS)


@inputs.few
@given(inputs.seeds)
def test_compiled_taking_equals_its_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(200)[:COUNT]).astype(np.float32)
    w = np.concatenate([np.zeros(64, np.uint8), chosen.view(np.uint8)])
    one = rng.standard_normal(300).astype(np.float32)
    two, y, expected = one.copy(), np.zeros(100, np.float32), np.zeros(100, np.float32)
    columns.take_columns(one, 50, w, 64, COUNT, y, 10)
    twin.take_columns(two, 50, w, 64, COUNT, expected, 10)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(one, two)
    assert (one[50 + chosen.astype(int)] == 0).all() and np.count_nonzero(one == 0) == COUNT


@pytest.mark.compiled
def test_in_float32_the_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    whole = logits(converted(folder, tmp_path / "whole.ert", "f32", 0))
    apart = logits(converted(folder, tmp_path / "apart.ert", "f32", COUNT))
    np.testing.assert_allclose(apart, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def test_the_columns_are_those_of_the_largest_features(q4_file: Path) -> None:
    with ErtFile.open(q4_file) as file:
        assert file.spec.outliers == COUNT
        for layer in range(file.spec.layers):
            for name in ("attention", "ffn"):
                found = file.raw(f"layers.{layer}.{name}_columns").view(np.float32)
                assert set(PLANTED) <= set(found.astype(int))
        kinds = {t.name.rpartition("_")[2]: t.quant for t in file.tensors.values() if "_out" in t.name}
    assert kinds["outliers"] == "q8"


@pytest.mark.compiled
def test_threads_and_chunks_do_not_change_a_bit(q4_file: Path) -> None:
    whole = logits(q4_file)
    np.testing.assert_array_equal(logits(q4_file, threads=2), whole)
    np.testing.assert_array_equal(logits(q4_file, chunk=1), whole)
    np.testing.assert_array_equal(logits(q4_file, chunk=3), whole)


@pytest.mark.compiled
def test_large_features_cost_less_apart(folder: Path, tmp_path: Path) -> None:
    exact, out = logits(converted(folder, tmp_path / "exact.ert", "f32", 0)), tmp_path / "m.ert"
    text, types = folder.parent / "text.jsonl", QuantSpec("q4", "f16")
    errors = []
    for count in (0, COUNT):
        edgert.convert(folder, out, types, calibrate=text, outliers=count)
        errors.append(float(np.square(logits(out) - exact).mean()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("wrong", [[5, 5], [7, 5], [-1, 5], [5, 96], [0.5, 5], [float("nan"), 5], [5, 1e30]])
def test_columns_that_cannot_be_are_found_when_a_file_is_opened(
    q4_file: Path, tmp_path: Path, wrong: list[float]
) -> None:
    path = tmp_path / "m.ert"
    with ErtFile.open(q4_file) as file:
        at = file.tensors["layers.1.attention_columns"].offset
        values = file.raw("layers.1.attention_columns").view(np.float32).copy()
    first = 0 if wrong[0] < 5 else COUNT - 2
    values[first : first + 2] = wrong
    data = bytearray(q4_file.read_bytes())
    data[at : at + values.nbytes] = values.tobytes()
    path.write_bytes(data)
    with pytest.raises(FormatError, match="F34") as caught:
        ErtFile.open(path)
    assert "attention_columns" in str(caught.value)


@pytest.mark.parametrize("count", [1, 31, -32, 128])
def test_numbers_of_columns_that_cannot_be(folder: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(OptionError, match="expected a multiple of 32 up to 96"):
        converted(folder, tmp_path / "m.ert", "q4", count)


def test_what_outliers_need_and_do_not_go_with(folder: Path, tmp_path: Path) -> None:
    text = folder.parent / "text.jsonl"
    with pytest.raises(OptionError, match="give calibrate"):
        edgert.convert(folder, tmp_path / "m.ert", outliers=COUNT)
    with pytest.raises(OptionError, match="give one"):
        edgert.convert(folder, tmp_path / "m.ert", calibrate=text, bits=4, outliers=COUNT)
    with pytest.raises(OptionError, match="neurons, experts or another block"):
        edgert.convert(folder, tmp_path / "m.ert", calibrate=text, sparsity=0.3, outliers=COUNT)
    with pytest.raises(ValueError, match="expected none"):
        ModelSpec("gemma2", 2, 96, 4, 2, 24, 160, 96, 64, 1e-5, outliers=COUNT, block="around")


def test_a_plan_has_their_size(folder: Path, q4_file: Path, tmp_path: Path) -> None:
    text = folder.parent / "text.jsonl"
    out = tmp_path / "m.ert"
    planned = edgert.convert(folder, out, "q4", calibrate=text, outliers=COUNT, dry_run=True)
    assert not out.exists()
    with ErtFile.open(q4_file) as file:
        made = {t.name: (t.quant, t.nbytes) for t in file.tensors.values() if t.role != "bytes"}
    assert {t.name: (t.quant, t.nbytes) for t in planned.tensors} == made
