"""Two halves of a model: what each holds, that they belong together, and that they are the whole."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgert
from edgert.config import EngineConfig
from edgert.converters import split
from edgert.errors import ChecksumError, ModelFileError, OptionError
from edgert.format import ErtFile
from edgert.format.identity import identity
from edgert.format.verify import check
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import tiny_models

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def logits_of_halves(edge: Path, cloud: Path) -> inputs.F32:
    with ErtFile.open(edge) as low, ErtFile.open(cloud) as high:
        config = EngineConfig(1, 64, 16)
        lower, upper = Forward(Weights.of_file(low), config), Forward(Weights.of_file(high), config)
        try:
            return upper.run(TOKENS, hidden=lower.run(TOKENS), outputs=range(len(TOKENS))).copy()
        finally:
            lower.close()
            upper.close()


@pytest.mark.parametrize("name", ["llama_head_dim", "qwen2_gqa_tied"])
def test_the_halves_hold_every_tensor_and_compute_what_the_whole_does(name: str, tmp_path: Path) -> None:
    folder, whole = tmp_path / "source", tmp_path / "whole.ert"
    tiny_models.write_folder(folder, name)
    edgert.convert(folder, whole, quant="q8")
    edge, cloud = tmp_path / "edge.ert", tmp_path / "cloud.ert"
    split(whole, 1, edge, cloud)
    assert check(edge) > 0 and check(cloud) > 0
    with ErtFile.open(whole) as a, ErtFile.open(edge) as b, ErtFile.open(cloud) as c:
        assert identity(a) == identity(b) == identity(c)
        assert set(b.tensors) | set(c.tensors) == set(a.tensors)
        both = {"rope_frequencies"} | ({"token_embedding"} if a.spec.tied_embeddings else set())
        assert set(b.tensors) & set(c.tensors) == both
        assert b.tokenizer_json() == a.tokenizer_json() and c.tokenizer_json() is None
        assert (b.spec.first_layer, b.spec.last_layer, c.spec.last_layer) == (0, 1, a.spec.layers)
        own = json.loads(c.metadata["errors"])
        assert own and set(own) <= set(c.tensors)
    with edgert.load(whole, threads=1) as model:
        inputs.same(logits_of_halves(edge, cloud), model.logits(TOKENS))


def test_a_folder_is_split_as_its_file_would_be(tiny_folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.ert"
    edgert.convert(tiny_folder, whole, quant="f32")
    split(whole, 1, tmp_path / "a.ert", tmp_path / "b.ert")
    split(tiny_folder, 1, tmp_path / "c.ert", tmp_path / "d.ert", "f32")
    assert (tmp_path / "a.ert").read_bytes() == (tmp_path / "c.ert").read_bytes()
    assert (tmp_path / "b.ert").read_bytes() == (tmp_path / "d.ert").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.ert", "b.ert", "c.ert", "d.ert", "whole.ert")
    ]


def test_other_weights_are_another_model(tiny_folder: Path, tiny_file: Path, tmp_path: Path) -> None:
    edgert.convert(tiny_folder, tmp_path / "q8.ert", quant="q8")
    with ErtFile.open(tiny_file) as a, ErtFile.open(tmp_path / "q8.ert") as b:
        assert identity(a) != identity(b)


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_a_layer_that_leaves_a_half_empty_is_refused(tiny_file: Path, tmp_path: Path, layer: int) -> None:
    with pytest.raises(OptionError, match=f"split is {layer}; expected 1 to 1 of 2 layers"):
        split(tiny_file, layer, tmp_path / "edge.ert", tmp_path / "cloud.ert")
    assert not list(tmp_path.iterdir())


def test_halves_are_not_split_or_run_alone(tiny_file: Path, tmp_path: Path) -> None:
    edge, cloud = tmp_path / "edge.ert", tmp_path / "cloud.ert"
    split(tiny_file, 1, edge, cloud)
    with pytest.raises(OptionError, match="half a model already"):
        split(edge, 1, tmp_path / "x.ert", tmp_path / "y.ert")
    with pytest.raises(ModelFileError, match="layers 0 to 1 of 2"):
        edgert.load(edge)
    with pytest.raises(ModelFileError, match=r"layers 1 to 2 of 2.*edgert cloud"):
        edgert.load(cloud)


def test_a_damaged_source_is_found(tiny_file: Path, tmp_path: Path) -> None:
    data = bytearray(tiny_file.read_bytes())
    with ErtFile.open(tiny_file) as file:
        data[file.tensors["layers.1.q"].offset] ^= 1
    damaged = tmp_path / "damaged.ert"
    damaged.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"layers\.1\.q"):
        split(damaged, 1, tmp_path / "edge.ert", tmp_path / "cloud.ert")
    assert not (tmp_path / "cloud.ert").exists()


def test_the_command_writes_both(tiny_file: Path, tmp_path: Path, cli: Callable[..., object]) -> None:
    edge, cloud = tmp_path / "edge.ert", tmp_path / "cloud.ert"
    done = cli("convert", tiny_file, "--split", 1, "-o", f"{edge},{cloud}", "--json")
    assert done.status == 0  # type: ignore[attr-defined]
    first, second = json.loads(done.out)  # type: ignore[attr-defined]
    assert (first["path"], second["path"]) == (str(edge), str(cloud))
    assert first["file_bytes"] == edge.stat().st_size
    for arguments, message in (
        (("--split", 1, "-o", edge), "expected two files"),
        (("--split", 1, "-o", f"{edge},{edge}"), "expected two names"),
        (("--split", 1, "--quant", "q4", "-o", f"{edge},{cloud}"), "--quant does not apply"),
    ):
        refused = cli("convert", tiny_file, *arguments)
        assert refused.status == 2 and message in refused.err  # type: ignore[attr-defined]


def test_rope_and_shapes_of_a_part_are_checked_on_reading(tiny_file: Path, tmp_path: Path) -> None:
    split(tiny_file, 1, tmp_path / "edge.ert", tmp_path / "cloud.ert")
    data = (tmp_path / "edge.ert").read_bytes()
    for wrong in (b"[1,0]", b"[0,3]", b"[0,0]", b"[0.5]"):
        changed = data.replace(b'\\"part\\":[0,1]', b'\\"part\\":' + wrong, 1)
        assert changed != data
        # The header keeps its length: one space of its end goes for every byte more.
        grown = len(changed) - len(data)
        length = int.from_bytes(data[:8], "little")
        body = changed[8 : 8 + length + grown]
        assert body.endswith(b" " * grown)
        (tmp_path / "bad.ert").write_bytes(data[:8] + body[: len(body) - grown] + data[8 + length :])
        with pytest.raises(ModelFileError, match="part"):
            ErtFile.open(tmp_path / "bad.ert")
    assert np.frombuffer(data[:8], "<u8")[0] > 0
