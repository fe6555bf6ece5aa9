"""Exit heads on their way from `edgert train exits` into a file, and what of them is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgert
from edgert.converters.exits import EXITS_FILE, fingerprint
from edgert.converters.safetensors_source import open_shard
from edgert.errors import ConversionError
from edgert.format import ErtFile
from edgert.kernels.packing import unpack
from tests import tiny_models
from tests.conftest import Outcome

CALIBRATION = {"temperature": 0.75, "confidence": [0.0, 0.5, 0.9], "tokens": [2, 4, 4], "agreed": [1, 2, 4]}
Damage = Callable[[dict[str, Any], dict[str, str]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers and width 40."""
    folder = tmp_path_factory.mktemp("exits") / "model"
    tiny_models.write_folder(folder, "llama_mqa_odd_sizes")
    return folder


def write_exits(folder: Path, path: Path, damage: Damage | None = None) -> Path:
    """Heads after layers 1 and 2 of the model in `folder`."""
    random = np.random.default_rng(5)
    tensors: dict[str, Any] = {}
    for layer in (2, 1):
        tensors[f"exits.{layer}.matrix"] = random.standard_normal((40, 40)).astype(np.float32)
        for name in ("norm", "output_norm"):
            tensors[f"exits.{layer}.{name}"] = random.standard_normal(40).astype(np.float16)
    norm = open_shard(folder / "model.safetensors")["model.norm.weight"]
    metadata = {"model": fingerprint(norm), "exits": json.dumps({"1": CALIBRATION, "2": CALIBRATION})}
    if damage is not None:
        damage(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def test_exits_are_stored_with_their_calibration(folder: Path, tmp_path: Path) -> None:
    exits = write_exits(folder, tmp_path / "e.safetensors")
    report = edgert.convert(folder, tmp_path / "m.ert", "f32", exits=exits)
    assert "exits.2.matrix" in {tensor.name for tensor in report.tensors}
    with ErtFile.open(tmp_path / "m.ert") as file:
        assert file.spec.exits == (1, 2)
        assert file.exits[2].above(0.9) == (0.4, 1.0)
        for name, values in load_file(exits).items():
            found = file.raw(name).view(np.float32)
            if values.ndim == 2:
                found = unpack("f32", file.raw(name), *values.shape)
            np.testing.assert_array_equal(found, values.astype(np.float32), name)
        del found
    with edgert.load(tmp_path / "m.ert") as model:
        assert model.generate([1, 2, 3], max_tokens=3).tokens


def test_a_folder_s_own_exits_are_taken_by_default(folder: Path, tmp_path: Path) -> None:
    own = write_exits(folder, folder / EXITS_FILE)
    try:
        edgert.convert(folder, tmp_path / "m.ert", "q8")
    finally:
        own.unlink()
    edgert.convert(folder, tmp_path / "plain.ert", "q8")
    for name, exits in (("m.ert", (1, 2)), ("plain.ert", ())):
        with ErtFile.open(tmp_path / name) as file:
            assert file.spec.exits == exits


def stranger(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["lm_head.weight"] = tensors["exits.1.matrix"].copy()


def too_high(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["exits.3.norm"] = tensors.pop("exits.1.norm")


def half(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors["exits.2.output_norm"]


def narrow(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors["exits.1.matrix"] = np.zeros((40, 39), np.float32)


def uncalibrated(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata["exits"]


def wrongly_calibrated(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["exits"] = json.dumps({"1": CALIBRATION, "2": CALIBRATION | {"temperature": -1}})


def of_another_model(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["model"] = "0" * 64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (stranger, "expected exit heads and their calibration; make them with `edgert train exits`"),
        (uncalibrated, "expected exit heads and their calibration"),
        (too_high, r"exits after layers \[1, 2, 3\] of another model than this one of 3 layers"),
        (of_another_model, "of another model .*; train exits on this model, or convert it without them"),
        (half, r"found no tensor exits.2.output_norm, expected one of shape \[40\]"),
        (narrow, r"found exits.1.matrix of shape \[40, 39\], expected \[40, 40\]"),
        (wrongly_calibrated, r"F31 exits: found temperature -1 for the exit after layer 2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    damage: Damage, message: str, folder: Path, tmp_path: Path
) -> None:
    exits = write_exits(folder, tmp_path / "e.safetensors", damage)
    with pytest.raises(ConversionError, match=message) as caught:
        edgert.convert(folder, tmp_path / "m.ert", exits=exits)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.ert").exists()


def test_the_command_takes_exits_and_inspect_shows_them(
    cli: Callable[..., Outcome], folder: Path, tmp_path: Path
) -> None:
    exits, out = write_exits(folder, tmp_path / "e.safetensors"), tmp_path / "m.ert"
    assert cli("convert", folder, "-o", out, "--exits", exits).status == 0
    shown = cli("inspect", out).out
    assert "exit after 2 layers, temperature 0.75: right for 70.0% of tokens; sure, 75.0% where" in shown
    assert "100.0% where >= 0.9 (40% of them)" in shown
    assert '"temperature"' not in shown
    assert json.loads(cli("inspect", out, "--json").out)["exits"]["1"] == CALIBRATION
    missing = cli("convert", folder, "-o", out, "--exits", tmp_path / "no.safetensors")
    assert (missing.status, missing.err.count("\n")) == (1, 1)
    assert "no.safetensors: cannot be read" in missing.err
