"""Converting GGUF files: the same .ert file as from the folder they were made of, or one line of why not."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import edgert
from edgert.config import Quant
from edgert.converters.gguf.architectures import ARCHITECTURES
from edgert.converters.gguf.reader import open_gguf
from edgert.converters.quantize import Codes
from edgert.format import ErtFile
from edgert.format.verify import check
from edgert.kernels.packing import unpack
from edgert.tokenizer import Tokenizer
from tests import gguf_files, tiny_models
from tests.conftest import Outcome

# What GGUF cannot say of these architectures, or llama.cpp does not compute.
NOT_IN_GGUF = {
    "llama_relu_f16",
    "llama_relu2",
    "llama_gelu_tanh",
    "llama_rope_dynamic",
    "mistral_window_yarn_factor",
    "qwen2_mha_window_layers",
    "qwen2_window_yarn_v4",
    "qwen3_alternating_windows",
    "qwen3_rope_yarn_mscale",
    "olmoe_gqa_biases_normalised",
    "qwen2_moe_dense_layers",
    "qwen2_moe_window",
    "qwen3_moe_biases_window",
    "granitemoe_tied",
    "granitemoe_untied",
}
IN_GGUF = {known.dense for known in ARCHITECTURES.values()} | {"mistral"}
NAMES = [
    name
    for name, config in tiny_models.CONFIGS.items()
    if name not in NOT_IN_GGUF and config["model_type"] in IN_GGUF
]


def exported(folder: Path, name: str = "llama_gqa_tied", kind: str = "F32", parts: int = 0) -> Path:
    tiny_models.write_folder(folder / name, name)
    gguf_files.export(folder / name, folder / "m.gguf", kind, parts)
    return folder / "m.gguf"


# A change of metadata: a value, None to leave the key out, or for an array (type of items, items).
Change = dict[str, Any]


def rewritten(folder: Path, change: Change, tensors: dict[str, Any] | None = None) -> Path:
    """The exported model with other metadata, and tensors replaced, added or (None) left out."""
    source = open_gguf(exported(folder))
    architecture = change.get("general.architecture", "llama")
    writer = gguf.GGUFWriter(folder / "changed.gguf", architecture)
    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in source.metadata.items()}
    del values["general.architecture"]
    for key, value in (values | change).items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    held = {name: tensor.vector().reshape(tensor.shape) for name, tensor in source.tensors.items()}
    for name, weights in (held | (tensors or {})).items():
        if weights is not None:
            writer.add_tensor(name, weights)
    gguf_files.finish(writer)
    return folder / "changed.gguf"


@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights_and_spec_as_from_the_folder(name: str, tmp_path: Path) -> None:
    edgert.convert(exported(tmp_path, name), tmp_path / "gguf.ert")
    edgert.convert(tmp_path / name, tmp_path / "folder.ert", quant="f32")
    with ErtFile.open(tmp_path / "gguf.ert") as ours, ErtFile.open(tmp_path / "folder.ert") as expected:
        eps = float(np.float32(expected.spec.norm_eps))  # GGUF holds 32 bits of it
        architecture = expected.spec.architecture.replace("mistral", "llama")
        # llama.cpp has Llama 3's rule as factors.
        scaling = {"llama3": "default"}.get(expected.spec.rope_scaling, expected.spec.rope_scaling)
        assert ours.spec == replace(
            expected.spec,
            norm_eps=eps,
            architecture=architecture,
            rope_scaling=scaling,
            rope_magnitude=ours.spec.rope_magnitude,
            bos_id=1,  # the exported vocabulary names them; a configuration may not
            eos_ids=(2,),
        )
        assert ours.spec.rope_magnitude == pytest.approx(expected.spec.rope_magnitude, rel=1e-6)
        for tensor in expected.tensors.values():
            if tensor.name == "rope_frequencies":
                found, wanted = (f.raw(tensor.name).view("<f4") for f in (ours, expected))
                np.testing.assert_allclose(found, wanted, rtol=1e-6)
            elif tensor.name != "tokenizer.json":
                assert ours.tensors[tensor.name].sha256 == tensor.sha256, tensor.name
    check(tmp_path / "gguf.ert")


# Our type for each of GGUF's, and whether a weight may change.
KEPT = {
    "F32": ("f32", True),
    "F16": ("f16", True),
    "BF16": ("f16", True),
    "Q8_0": ("q8", True),
    "Q5_0": ("q8", True),
    "Q5_1": ("q8", False),
    "Q4_0": ("q4", True),
    "Q4_1": ("q4m", True),
    "MXFP4": ("q8", True),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_type_is_kept_or_the_nearest_taken(kind: str, tmp_path: Path) -> None:
    path = exported(tmp_path, kind=kind)
    report = edgert.convert(path, tmp_path / "m.ert")
    ours, exact = KEPT[kind]
    source = open_gguf(path)
    with ErtFile.open(tmp_path / "m.ert") as file:
        for tensor in report.tensors:
            if len(tensor.shape) != 2:
                continue
            assert (tensor.source_type, tensor.quant) == (kind, ours)
            name = "token_embd.weight" if tensor.name == "token_embedding" else None
            layer, _, part = tensor.name.removeprefix("layers.").partition(".")
            name = name or f"blk.{layer}.{ {'v': 'attn_v', 'down': 'ffn_down'}.get(part) }.weight"
            if name not in source.tensors:
                continue
            stored = source.tensors[name]
            weights = stored.kind.weights(stored.rows(0, stored.shape[0]))
            decoded = weights.floats() if isinstance(weights, Codes) else weights
            kept = unpack(ours, file.raw(tensor.name), *tensor.shape)
            assert np.array_equal(kept, decoded) is exact
            assert (tensor.relative_error == 0) is exact
            np.testing.assert_allclose(kept, decoded, atol=0.2 * np.abs(decoded).max())


def test_experts_keep_their_type(tmp_path: Path) -> None:
    report = edgert.convert(exported(tmp_path, "mixtral_gqa_tied", "Q4_0"), tmp_path / "m.ert")
    experts = [tensor for tensor in report.tensors if ".experts." in tensor.name]
    assert len(experts) == 2 * 4
    assert {(t.source_type, t.quant, t.relative_error) for t in experts} == {("Q4_0", "q4", 0.0)}
    routers = [tensor for tensor in report.tensors if tensor.name.endswith("router")]
    assert {(t.source_type, t.quant) for t in routers} == {("F32", "f32")}


def test_an_expert_of_several_types_takes_the_most_precise(tmp_path: Path) -> None:
    path = exported(tmp_path, "mixtral_gqa_tied", "Q4_0")
    data = path.read_bytes()
    down = open_gguf(path).tensors["blk.0.ffn_down_exps.weight"]
    name = data.index(b"blk.0.ffn_down_exps.weight")
    kind = data.index(struct.pack("<I", 2), name + 26 + 4 + 3 * 8)  # behind the name and the sizes
    changed = data[:kind] + struct.pack("<I", 20) + data[kind + 4 :]  # IQ4_NL, as large as Q4_0
    path.write_bytes(changed)
    assert open_gguf(path).tensors[down.name].kind.name == "IQ4_NL"
    report = edgert.convert(path, tmp_path / "m.ert")
    assert {(t.quant, t.relative_error) for t in report.tensors if "layers.0.experts" in t.name} == {
        ("q8", 0)
    }
    assert {(t.quant, t.relative_error) for t in report.tensors if "layers.1.experts" in t.name} == {
        ("q4", 0)
    }


@pytest.mark.parametrize(
    ("kind", "quant", "exact"), [("Q4_0", "q8", True), ("Q8_0", "q4", False), ("F16", "f32", True)]
)
def test_a_quant_that_is_asked_for(kind: str, quant: Quant, exact: bool, tmp_path: Path) -> None:
    report = edgert.convert(exported(tmp_path, kind=kind), tmp_path / "m.ert", quant=quant)
    matrices = [t for t in report.tensors if len(t.shape) == 2]
    assert {t.quant for t in matrices} == {quant}
    assert all((t.relative_error == 0) is exact for t in matrices)


def test_slabs_of_any_size_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(tmp_path, "llama_mqa_odd_sizes", "F16")
    edgert.convert(path, tmp_path / "whole.ert")
    monkeypatch.setattr("edgert.converters.pipeline.SLAB_WEIGHTS", 16 * 40)  # 16 rows, over heads of 8
    edgert.convert(path, tmp_path / "slabs.ert")
    assert (tmp_path / "slabs.ert").read_bytes() == (tmp_path / "whole.ert").read_bytes()


def test_heads_larger_than_a_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported(tmp_path, "llama_head_dim", "F32")  # heads of 24 rows
    edgert.convert(path, tmp_path / "whole.ert")
    monkeypatch.setattr("edgert.converters.pipeline.SLAB_WEIGHTS", 16 * 40)
    edgert.convert(path, tmp_path / "slabs.ert")
    assert (tmp_path / "slabs.ert").read_bytes() == (tmp_path / "whole.ert").read_bytes()


def test_parts_convert_as_the_whole(tmp_path: Path) -> None:
    edgert.convert(exported(tmp_path), tmp_path / "whole.ert")
    exported(tmp_path, parts=6)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    edgert.convert(parts[1], tmp_path / "parts.ert")
    with ErtFile.open(tmp_path / "whole.ert") as whole, ErtFile.open(tmp_path / "parts.ert") as joined:
        assert {t.name: t.sha256 for t in whole.tensors.values()} == {
            t.name: t.sha256 for t in joined.tensors.values()
        }


@pytest.mark.compiled
def test_a_converted_file_generates_as_the_folder_does(tmp_path: Path) -> None:
    edgert.convert(exported(tmp_path), tmp_path / "gguf.ert")
    edgert.convert(tmp_path / "llama_gqa_tied", tmp_path / "folder.ert", quant="f32")
    tokens = tiny_models.tokens(20)
    found = []
    for name in ("gguf.ert", "folder.ert"):
        with edgert.load(tmp_path / name, threads=1) as model:
            found.append(model.logits(tokens))
    np.testing.assert_array_equal(*found)


def test_metadata_that_chat_needs(tmp_path: Path) -> None:
    path = rewritten(tmp_path, {"tokenizer.chat_template": "{{ messages[0].content }}"})
    edgert.convert(path, tmp_path / "m.ert")
    with ErtFile.open(tmp_path / "m.ert") as file:
        assert file.metadata["chat_template"] == "{{ messages[0].content }}"
        assert (file.metadata["bos_token"], file.metadata["eos_token"]) == ("<s>", "</s>")
        assert file.metadata["source"] == "changed.gguf"


def test_the_report_says_what_became_of_each_type(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = cli("convert", exported(tmp_path, kind="Q5_1"), "-o", tmp_path / "m.ert")
    assert outcome.status == 0
    assert "Q5_1 -> q8   rounded, error up to" in outcome.out
    outcome = cli("convert", exported(tmp_path, kind="Q4_0"), "-o", tmp_path / "m.ert")
    assert "Q4_0 -> q4   exact" in outcome.out


def test_values_no_writer_makes_are_rounded_and_reported(tmp_path: Path) -> None:
    """Q8_0 holds -128 times its scale, which our 8 bits do not."""
    path = exported(tmp_path, kind="Q8_0")
    tensor = open_gguf(path).tensors["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 2] = 0x80
    path.write_bytes(data)
    errors = {t.name: t.relative_error for t in edgert.convert(path, tmp_path / "m.ert").tensors}
    assert 0 < errors["layers.0.up"] < 0.01
    assert errors["layers.1.up"] == 0


def test_the_bundled_model_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = Path(edgert.__file__).parent / "assets" / "draft"
    gguf_files.export(folder, tmp_path / "m.gguf", "F16")
    edgert.convert(tmp_path / "m.gguf", tmp_path / "m.ert")
    original = Tokenizer((folder / "tokenizer.json").read_bytes())
    with ErtFile.open(tmp_path / "m.ert") as file:
        ours = Tokenizer(file.tokenizer_json() or b"")
    assert json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    for text in ("Once upon a time, there was a cat.", " 123  \n\n caf\u00e9 \U0001f600<s></s>"):
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
