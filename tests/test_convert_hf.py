"""Converting Hugging Face folders: what is written, and from which files."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgert.config import QuantSpec
from edgert.converters import convert
from edgert.converters.architectures import describe, source_name
from edgert.converters.hf_config import HfConfig
from edgert.format import ErtFile, declared
from edgert.format.verify import check
from edgert.kernels.packing import unpack

Tensors = dict[str, NDArray[np.float32]]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "vocab_size": 100,
    "eos_token_id": [2, 3],
    "bos_token_id": 1,
}
LETTERS = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "llama": "Llama"}


def tensors_of(config: dict[str, Any], seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    spec = describe(HfConfig(config, "config.json"), HfConfig({}, "generation_config.json")).spec
    return {
        source_name(decl.name): rng.standard_normal(decl.shape).astype(np.float32)
        for decl in declared(spec)
        if decl.name != "rope_frequencies"
    }


def shard_bytes(tensors: Tensors, dtype: str = "F32") -> bytes:
    """A safetensors file, written by hand: the library's NumPy side has no bfloat16."""
    header, data = {}, b""
    for name, values in tensors.items():
        if dtype == "BF16":
            raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            raw = values.astype({"F32": "<f4", "F16": "<f2"}.get(dtype, "i1")).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors or tensors_of(config)))
    return folder


def write_shards(
    folder: Path, tensors: Tensors, names: tuple[str, str] = ("a.safetensors", "b.safetensors")
) -> None:
    (folder / "model.safetensors").unlink()
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    for shard in names:
        if "/" not in shard:
            part = {name: values for name, values in tensors.items() if places[name] == shard}
            (folder / shard).write_bytes(shard_bytes(part))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def stored(path: Path) -> tuple[ErtFile, Callable[[str], NDArray[np.float32]]]:
    """An opened file, and a function that decodes its tensors."""
    file = ErtFile.open(path)

    def decode(name: str) -> NDArray[np.float32]:
        tensor = file.tensors[name]
        if tensor.role == "matrix":
            rows, columns = tensor.shape
            return unpack(tensor.quant, file.raw(name), rows, columns)
        return file.raw(name).view(np.float32)

    return file, decode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny-llama", CONFIG)


@pytest.mark.parametrize("model_type", LETTERS)
def test_f32_keeps_every_weight_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": model_type, "architectures": [LETTERS[model_type] + "ForCausalLM"]}
    tensors = tensors_of(config)
    report = convert(write_folder(tmp_path / "m", config, tensors), tmp_path / "m.ert", "f32")
    check(tmp_path / "m.ert")
    file, decode = stored(tmp_path / "m.ert")
    for decl in declared(file.spec):
        if decl.name != "rope_frequencies":
            np.testing.assert_array_equal(decode(decl.name), tensors[source_name(decl.name)], decl.name)
    assert {tensor.relative_error for tensor in report.tensors} == {0.0}
    assert file.spec.architecture == model_type
    assert (file.spec.bos_id, file.spec.eos_ids) == (1, (2, 3))


def test_the_rotary_frequencies_are_stored(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.ert")
    _, decode = stored(tmp_path / "m.ert")
    expected = [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.0031622776, 0.001, 0.00031622776]
    np.testing.assert_allclose(decode("rope_frequencies"), expected, rtol=1e-6)


@pytest.mark.parametrize(("quant", "worst"), [("f16", 3e-4), ("q8", 0.01), ("q4", 0.11)])
def test_the_report_says_what_was_lost_and_the_file_repeats_it(
    folder: Path, tmp_path: Path, quant: Any, worst: float
) -> None:
    report = convert(folder, tmp_path / "m.ert", quant)
    file, decode = stored(tmp_path / "m.ert")
    tensors = tensors_of(CONFIG)
    kept = json.loads(file.metadata["errors"])
    for tensor in report.tensors:
        assert tensor.quant == (quant if len(tensor.shape) == 2 else "f32")
        assert tensor.nbytes == file.tensors[tensor.name].nbytes
        if len(tensor.shape) == 2:
            original = tensors[source_name(tensor.name)]
            lost = np.linalg.norm(original - decode(tensor.name)) / np.linalg.norm(original)
            assert tensor.relative_error == pytest.approx(lost, rel=1e-4)
            assert kept[tensor.name] == pytest.approx(lost, rel=1e-3)
            assert 0 < lost < worst
    assert report.file_bytes == (tmp_path / "m.ert").stat().st_size
    assert report.parameters == sum(values.size for values in tensors.values())
    assert report.path == tmp_path / "m.ert" and report.seconds > 0 and report.peak_rss_bytes > 1 << 20


def test_the_embedding_may_have_a_quantisation_of_its_own(folder: Path, tmp_path: Path) -> None:
    report = convert(folder, tmp_path / "m.ert", QuantSpec(matrices="q4", embedding="q8"))
    quants = {tensor.name: tensor.quant for tensor in report.tensors if len(tensor.shape) == 2}
    assert quants.pop("token_embedding") == "q8"
    assert set(quants.values()) == {"q4"}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_sources_of_every_float_type_are_read(folder: Path, tmp_path: Path, dtype: str) -> None:
    tensors = {
        name: (np.round(values * 16) / 16).astype(np.float32) for name, values in tensors_of(CONFIG).items()
    }
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors, dtype))
    convert(folder, tmp_path / "m.ert", "f32")
    _, decode = stored(tmp_path / "m.ert")
    np.testing.assert_array_equal(decode("layers.1.down"), tensors["model.layers.1.mlp.down_proj.weight"])


def test_a_file_of_the_safetensors_library_is_read(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "m.ert", "f32")
    _, decode = stored(tmp_path / "m.ert")
    np.testing.assert_array_equal(decode("output"), tensors["lm_head.weight"])


def test_shards_give_the_same_file_as_one(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "one.ert")
    write_shards(folder, tensors_of(CONFIG))
    convert(folder, tmp_path / "two.ert")
    assert (tmp_path / "one.ert").read_bytes() == (tmp_path / "two.ert").read_bytes()


def test_old_inverse_frequencies_and_the_copy_of_a_tied_output_are_left_out(tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = tensors_of(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    convert(write_folder(tmp_path / "m", config, tensors), tmp_path / "m.ert")
    assert "output" not in ErtFile.open(tmp_path / "m.ert").tensors


def test_an_output_that_differs_from_the_embedding_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    folder = write_folder(tmp_path / "m", CONFIG | {"tie_word_embeddings": True}, tensors)
    convert(folder, tmp_path / "m.ert", "f32")
    _, decode = stored(tmp_path / "m.ert")
    np.testing.assert_array_equal(decode("output"), tensors["lm_head.weight"])


def test_tokenizer_template_and_provenance_are_kept(folder: Path, tmp_path: Path) -> None:
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    convert(folder, tmp_path / "m.ert")
    file = ErtFile.open(tmp_path / "m.ert")
    assert file.tokenizer_json() == b'{"version": "1.0"}'
    assert file.metadata["chat_template"] == "{{ messages }}"
    assert (file.metadata["bos_token"], file.metadata["eos_token"]) == ("<s>", "</s>")
    assert file.metadata["source"] == "tiny-llama"
    assert file.metadata["converter"].startswith("edgert ")
    assert str(tmp_path) not in json.dumps(file.metadata)


def test_a_template_file_comes_before_the_one_in_the_config(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    convert(folder, tmp_path / "m.ert")
    assert ErtFile.open(tmp_path / "m.ert").metadata["chat_template"] == "plain"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}é")
    convert(folder, tmp_path / "m.ert")
    assert ErtFile.open(tmp_path / "m.ert").metadata["chat_template"] == "{{ bos_token }}é"


def test_progress_grows_to_the_total_and_names_every_tensor(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = convert(folder, tmp_path / "m.ert", "q4", lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    total = sum(tensor.nbytes for tensor in report.tensors)
    assert done == sorted(done) and done[-1] == total
    assert {call[2] for call in calls} == {total}
    assert [call[0] for call in calls] == [tensor.name for tensor in report.tensors]


def test_memory_does_not_grow_with_a_matrix(tmp_path: Path) -> None:
    """The embedding is 64 MB as float32; slabs and their copies stay well below."""
    config = CONFIG | {"vocab_size": 65536, "hidden_size": 256, "tie_word_embeddings": True}
    folder = write_folder(tmp_path / "wide", config)
    tracemalloc.start()
    try:
        convert(folder, tmp_path / "m.ert", "q8")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
