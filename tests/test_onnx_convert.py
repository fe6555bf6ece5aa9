"""ONNX decoders: recognised by structure, converted, and equal to what onnxruntime computes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.errors import ConversionError, EdgertError, NotAModelError, OptionError, UnsupportedError
from edgert.format import ErtFile
from tests import tiny_models
from tests.conftest import Outcome

onnx = pytest.importorskip("onnx", reason="needs the extra `convert`")
pytest.importorskip("onnxruntime", reason="needs the extra `convert`")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgert.converters.onnx.reference import onnx_logits  # noqa: E402
from tests import onnx_files  # noqa: E402

NAMES = ("llama_gqa_tied", "qwen2_gqa_tied", "qwen3_heads_of_32")
EXPORTS = [*((name, style) for name in NAMES for style in ("operators", "spelled")), ("llama_mha", "heads")]
TOKENS = [(7 * i * i + 3 * i) % tiny_models.SMALLEST_VOCAB for i in range(40)]


def difference(path: Path, out: Path) -> float:
    with edgert.load(out, threads=1) as model:
        return float(np.abs(model.logits(TOKENS) - onnx_logits(path, TOKENS)).max())


@pytest.mark.parametrize(("name", "style"), EXPORTS)
def test_the_same_file_as_from_the_folder(name: str, style: str, tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path / "onnx", name, style)
    config = onnx_files.CONFIGS[name]
    tiny_models.write_model(tmp_path / "folder", config, tiny_models.weights(config, tiny_models.SEED))
    edgert.convert(path, tmp_path / "onnx.ert")
    edgert.convert(tmp_path / "folder", tmp_path / "folder.ert", "f32")
    with ErtFile.open(tmp_path / "onnx.ert") as one, ErtFile.open(tmp_path / "folder.ert") as other:
        ours, theirs = one.spec.to_json(), other.spec.to_json()
        assert ours.pop("norm_eps") == pytest.approx(theirs.pop("norm_eps"))  # float32 in a graph
        assert ours == theirs
        assert set(one.tensors) == set(other.tensors)
        for tensor in one.tensors:
            if tensor == "rope_frequencies":
                found, expected = (np.frombuffer(f.raw(tensor), np.float32) for f in (one, other))
                np.testing.assert_allclose(found, expected, rtol=1e-5)
            elif tensor != "tokenizer.json":
                assert bytes(one.raw(tensor)) == bytes(other.raw(tensor)), tensor


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "style"), EXPORTS)
def test_logits_are_those_of_onnxruntime(name: str, style: str, tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, name, style)
    edgert.convert(path, tmp_path / "m.ert", "f32")
    assert difference(path, tmp_path / "m.ert") < 1e-3


@pytest.mark.compiled
def test_a_window_hides_as_many_keys_as_in_onnxruntime(tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "operators", window=8)
    edgert.convert(path, tmp_path / "m.ert", "f32")
    assert difference(path, tmp_path / "m.ert") < 1e-3


@pytest.mark.compiled
def test_halves_are_kept_and_their_rotary_tables_are_exact_enough(tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "spelled", kind="f16", external=True)
    report = edgert.convert(path, tmp_path / "m.ert")
    assert {t.quant for t in report.tensors if t.source_type == "FLOAT16"} == {"f16"}
    assert difference(path, tmp_path / "m.ert") < 2e-2  # onnxruntime computes in 16 bits


@pytest.mark.compiled
@pytest.mark.parametrize(("blocks", "kept"), [("middle", "q4"), ("zeros", "q8")])
def test_blocks_of_four_bits_are_kept_without_loss(blocks: str, kept: str, tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "operators", blocks=blocks)
    report = edgert.convert(path, tmp_path / "m.ert")
    found = {t.quant for t in report.tensors if t.source_type == "int4x32"}
    assert found == {kept}
    assert not any(t.relative_error for t in report.tensors)
    edgert.convert(path, tmp_path / "wide.ert", "f32")
    assert difference(path, tmp_path / "wide.ert") < 1e-3


def test_the_data_file_is_read_and_a_folder_will_do(tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path / "one", "llama_gqa_tied", "operators", external=True)
    inside = onnx_files.written(tmp_path / "two", "llama_gqa_tied", "operators")
    assert path.stat().st_size < inside.stat().st_size / 2
    edgert.convert(tmp_path / "one", tmp_path / "one.ert")
    edgert.convert(tmp_path / "two", tmp_path / "two.ert")
    with ErtFile.open(tmp_path / "one.ert") as one, ErtFile.open(tmp_path / "two.ert") as two:
        assert all(bytes(one.raw(name)) == bytes(two.raw(name)) for name in two.tensors)


@pytest.fixture
def model() -> Any:
    return onnx_files.Decoder("llama_gqa_tied", "spelled").model()


def refused(tmp_path: Path, model: Any) -> EdgertError:
    path = onnx_files.write(tmp_path, model, tiny_models.CONFIGS["llama_gqa_tied"])
    with pytest.raises(EdgertError) as caught:
        edgert.convert(path, tmp_path / "m.ert")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.ert").exists()
    return caught.value


def external(tensor: Any, location: str, **place: int) -> None:
    raw = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": raw, **place}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "", "a\\b", "x\0y"])
def test_data_outside_the_folder_is_not_opened(location: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    external(model.graph.initializer[-1], location)
    error = refused(tmp_path / "folder", model)
    assert isinstance(error, ConversionError)
    assert "expected a file in the model's folder" in str(error)


@pytest.mark.parametrize("is_folder", [True, False])
def test_links_are_not_followed(is_folder: bool, model: Any, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "data").write_bytes(bytes(1 << 20))
    (tmp_path / "folder").mkdir()
    target = tmp_path / "away" if is_folder else tmp_path / "away" / "data"
    (tmp_path / "folder" / "link").symlink_to(target)
    external(model.graph.initializer[-1], "link/data" if is_folder else "link")
    assert "found a link" in str(refused(tmp_path / "folder", model))


@pytest.mark.parametrize("place", [{"offset": 1 << 40}, {"length": 8}, {"offset": -4}, {"length": 1 << 70}])
def test_places_outside_the_data_are_refused(place: dict[str, int], model: Any, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 16))
    external(model.graph.initializer[-1], "data", **place)
    assert isinstance(refused(tmp_path, model), ConversionError)


def test_a_name_that_is_no_text_is_refused(model: Any, tmp_path: Path) -> None:
    external(model.graph.initializer[-1], "model.data")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString().replace(b"model.data", b"mod\xffl.data"))
    with pytest.raises(NotAModelError, match="expected UTF-8"):
        edgert.convert(path, tmp_path / "m.ert")


def test_a_shape_that_lies_is_refused(model: Any, tmp_path: Path) -> None:
    model.graph.initializer[-1].dims[0] = 1 << 60
    assert "expected a shape and bytes that agree" in str(refused(tmp_path, model))


def test_a_cycle_is_refused(model: Any, tmp_path: Path) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gather")
    node.input[0] = model.graph.node[-1].output[0]
    assert "before anything makes it" in str(refused(tmp_path, model))


def test_an_operator_of_its_own_domain_is_named(model: Any, tmp_path: Path) -> None:
    model.graph.node[5].domain = "evil.example"
    assert "'evil.example'" in str(refused(tmp_path, model))


def test_an_operator_a_decoder_does_not_have_is_named(model: Any, tmp_path: Path) -> None:
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type = "HardSigmoid"
            break
    error = refused(tmp_path, model)
    assert isinstance(error, UnsupportedError)
    assert "found Mul making" in str(error) and "a gated feed-forward" in str(error)


def test_other_scales_of_scores_are_refused(model: Any, tmp_path: Path) -> None:
    numbers = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.dims}
    divisors = (node for node in model.graph.node if node.op_type == "Div" and node.input[1] in numbers)
    tensor = numbers[next(divisors).input[1]]
    tensor.CopyFrom(numpy_helper.from_array(np.float32(3), tensor.name))
    assert "scores multiplied by" in str(refused(tmp_path, model))


def test_a_factor_behind_attention_is_refused(model: Any, tmp_path: Path) -> None:
    """Granite has such factors, elsewhere."""
    softmax = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Softmax")
    place, turn = next(
        (i, n) for i, n in enumerate(model.graph.node) if i > softmax and n.op_type == "Transpose"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
    scaled = helper.make_node("Mul", ["whole", "half"], [turn.output[0]])
    turn.output[0] = "whole"
    model.graph.node.insert(place + 1, scaled)
    assert "not scaled" in str(refused(tmp_path, model))


def test_a_picture_classifier_is_no_language_model(tmp_path: Path) -> None:
    kernel = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])]
    classifier = helper.make_model(helper.make_graph(nodes, "g", given, made, [kernel]), ir_version=9)
    error = refused(tmp_path, classifier)
    assert isinstance(error, NotAModelError)
    assert "comes from Relu" in str(error)


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_a_cut_file_is_refused(cut: int, model: Any, tmp_path: Path) -> None:
    path = onnx_files.write(tmp_path, model, tiny_models.CONFIGS["llama_gqa_tied"])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(EdgertError):
        edgert.convert(path, tmp_path / "m.ert")


@pytest.mark.parametrize(
    ("missing", "message"), [("tokenizer.json", "found no tokenizer.json"), ("config.json", "context length")]
)
def test_what_the_graph_cannot_say_is_asked_for(
    missing: str, message: str, model: Any, tmp_path: Path
) -> None:
    path = onnx_files.write(tmp_path, model, tiny_models.CONFIGS["llama_gqa_tied"])
    (tmp_path / missing).unlink()
    with pytest.raises(ConversionError, match=message):
        edgert.convert(path, tmp_path / "m.ert")


@pytest.mark.parametrize("op", ["Add", "Gather", "Slice", "Softmax"])
def test_an_operator_without_its_inputs_is_refused(op: str, model: Any, tmp_path: Path) -> None:
    del next(node for node in model.graph.node if node.op_type == op).input[0 if op != "Add" else 1 :]
    assert "inputs of" in str(refused(tmp_path, model))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "operators")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConversionError, match=rf"no package {package} .*pip install 'edgert\[convert\]'"):
        onnx_logits(path, TOKENS)


def test_sparse_initialisers_are_refused(model: Any, tmp_path: Path) -> None:
    model.graph.sparse_initializer.add().dims.append(4)
    assert "sparse initialisers" in str(refused(tmp_path, model))


@pytest.mark.compiled
def test_verify_passes_and_fails(cli: Any, tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "operators")
    command = ("convert", str(path), "-o", str(tmp_path / "m.ert"), "--verify")
    done: Outcome = cli(*command, "--json")
    assert done.status == 0
    assert json.loads(done.out)["verification"]["passed"]
    done = cli(*command, "--quant", "q4")
    assert done.status == 0
    assert "before rounding, logits differ" in done.out
    assert {path.suffix for path in tmp_path.iterdir()} == {".onnx", ".json", ".ert"}
    # The config says the wrong window: the graph's mask, which is computed, has none.
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "spelled")
    config = tiny_models.CONFIGS["llama_gqa_tied"] | {"model_type": "mistral", "sliding_window": 4}
    config["architectures"] = ["MistralForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = cli(*command)
    assert done.status == 1
    assert "logits differ from onnxruntime's" in done.err


def test_verify_is_for_onnx(tiny_folder: Path, tmp_path: Path) -> None:
    from edgert.calibration.verify import check_source

    with pytest.raises(OptionError, match="--verify runs ONNX models"):
        check_source(tiny_folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(5, "", "expected attention under a mask"), (3, "ids", "expected attention without a bias of its own")],
)
def test_attention_of_many_heads_that_is_something_else_is_refused(
    place: int, value: str, message: str, tmp_path: Path
) -> None:
    path = onnx_files.written(tmp_path, "llama_mha", "heads")
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention":
            node.input[place] = value
    onnx.save_model(model, path)
    with pytest.raises(UnsupportedError, match=message):
        edgert.convert(path, tmp_path / "m.ert")


@pytest.mark.compiled
@pytest.mark.parametrize("style", ["operators", "spelled"])
def test_a_merged_decoder_is_that_of_its_branches(style: str, tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", style)
    edgert.convert(path, tmp_path / "one.ert")
    onnx_files.merge(path)
    edgert.convert(path, tmp_path / "merged.ert")
    with ErtFile.open(tmp_path / "one.ert") as one, ErtFile.open(tmp_path / "merged.ert") as merged:
        assert one.spec == merged.spec
        for tensor in one.tensors:
            assert bytes(one.raw(tensor)) == bytes(merged.raw(tensor)), tensor
    assert difference(path, tmp_path / "merged.ert") < 1e-3


def test_an_if_that_is_not_the_whole_model_is_refused(tmp_path: Path) -> None:
    path = onnx_files.written(tmp_path, "llama_gqa_tied", "spelled")
    onnx_files.merge(path)
    model = onnx.load(path)
    last = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Neg", [last], ["negative"]))
    model.graph.output[0].name = "negative"
    onnx.save_model(model, path)
    with pytest.raises(NotAModelError, match=r"no output that is a product .*the first comes from Neg"):
        edgert.convert(path, tmp_path / "m.ert")
