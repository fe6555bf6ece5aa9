"""Small inputs taken for zero: found in a text, kept in the file, and made up for by verification."""

import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgert
from edgert.calibration.inputs import find_inputs
from edgert.calibration.skipping import cosines, find_skips
from edgert.config import DOWN, LEFT_OUT, OUT, QKV, UP, EngineConfig, ModelSpec
from edgert.errors import OptionError, UsageError
from edgert.format import ErtFile
from edgert.kernels import program, quantize
from edgert.kernels.reference import quantize as twins
from edgert.model.forward import WHOLE_AT_START, Forward
from tests import kernel_inputs as inputs
from tests import tiny_models

TEXT = "the cat sat on the mat and the dog ran to the cat " * 30
SPEC = ModelSpec("llama", 2, 40, 4, 2, 12, 72, 83, 80, 1e-5)


@pytest.fixture(scope="module")
def teal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model converted so that half of its weights meet zeros; the text beside it."""
    folder = tmp_path_factory.mktemp("teal")
    tiny_models.write_folder(folder / "model", "llama_gqa_tied")
    (folder / "text.txt").write_text(TEXT)
    edgert.convert(
        *(folder / "model", folder / "m.ert", "q8"), sparsity="teal:0.5", calibrate=folder / "text.txt"
    )
    return folder


def logits(quant: str, thresholds: Any, rows: int, whole: int = 0) -> Any:
    """Of 24 tokens, given `rows` at a time; thresholds apply from position `whole` on."""
    weights = inputs.tiny_weights(SPEC, lambda tensor: quant)
    tokens = [int(t) for t in inputs.whole("tokens", 0, SPEC.vocab - 1, 24)]
    with closing(Forward(weights, EngineConfig(1, 80, 32, inputs=thresholds))) as model:
        model.whole = whole
        pieces = [tokens[i : i + rows] for i in range(0, 24, rows)]
        return np.concatenate([model.run(piece, outputs=range(len(piece))).copy() for piece in pieces])


@inputs.some
@given(seed=inputs.seeds, least=st.sampled_from((0.0, 0.1, 0.5)), flavour=inputs.flavours)
def test_what_is_below_the_threshold_is_zero(seed: int, least: float, flavour: str) -> None:
    x = inputs.floats((seed, "x"), flavour, 64)
    found, theirs = x.copy(), x.copy()
    quantize.trim(found, 16, 32, np.float32(least))
    twins.trim(theirs, 16, 32, np.float32(least))
    inputs.same(found, theirs)
    expected = x.copy()
    expected[16:48][np.abs(x[16:48]) < np.float32(least)] = 0
    inputs.same(found, expected)


@pytest.mark.parametrize("quant", ["q8", "f32"])
def test_thresholds_of_zero_change_nothing_and_others_each_row_alone(quant: str) -> None:
    plain = logits(quant, (), 8)
    inputs.same(logits(quant, ((0.0,) * 4,) * 2, 8), plain)
    cuts = ((0.2, 0.05, 0.3, 0.02),) * 2
    cut = logits(quant, cuts, 8)
    for rows in (1, 3, 24):
        inputs.same(logits(quant, cuts, rows), cut)
    late = logits(quant, cuts, 8, whole=10)
    inputs.same(late[:10], plain[:10])
    for place in (QKV, OUT, UP, DOWN):  # each of them is where it should be
        one = tuple(1e9 if place == other else 0.0 for other in range(4))
        assert not np.array_equal(logits(quant, (one, (0.0,) * 4), 8), plain)


@pytest.mark.parametrize("place", [QKV, OUT, UP, DOWN])
def test_a_product_of_nothing_is_nothing(place: int) -> None:
    """All of an input below its threshold: as if its matrices were zero, whoever else reads its rows."""
    one = tuple(1e9 if place == other else 0.0 for other in range(4))
    weights = inputs.tiny_weights(SPEC, lambda tensor: "f32")
    names = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))[place]
    data = weights.data.copy()
    for name in names:
        for layer in range(SPEC.layers):
            tensor = weights.tensors[f"layers.{layer}.{name}"]
            data[tensor.offset : tensor.offset + tensor.nbytes] = 0
    tokens = [int(t) for t in inputs.whole("tokens", 0, SPEC.vocab - 1, 24)]
    data.flags.writeable = False
    with closing(Forward(type(weights)(SPEC, data, weights.tensors), EngineConfig(1, 80, 32))) as model:
        expected = model.run(tokens, outputs=range(24)).copy()
    inputs.same(logits("f32", (one, one), 24), expected)


@pytest.mark.compiled
def test_levels_have_the_share_that_was_wanted_and_thresholds_leave_it(teal: Path) -> None:
    with ErtFile.open(teal / "m.ert") as file:
        assert file.inputs is not None and file.inputs.share == 0.5
        spec, found = file.spec, file.inputs
    heads, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    sizes = np.array([spec.width * (heads + 2 * kv), spec.width * heads, 2 * spec.width * spec.ffn_width, 0])
    sizes[3] = sizes[2] // 2
    for zeros in found.zeros:
        assert np.dot(zeros, sizes) / sizes.sum() == pytest.approx(0.5, abs=0.001)
        assert len(set(zeros)) > 1  # by what they cost, not all alike
    with edgert.load(teal / "m.ert", threads=1) as model:
        tokens = model.tokenizer.encode(TEXT)[:200]
        forward = model._engine.forward
        seen: dict[int, float] = {}

        def look(at: int, width: int) -> Any:
            def watch(count: int) -> None:
                x, stride = forward.code[at][3:5]
                rows = forward.state.f[x : x + count * stride].reshape(count, stride)[:, :width]
                seen[at] = float((rows[WHOLE_AT_START:] == 0).mean())

            return watch

        places = list(forward.trims.items())
        assert all(forward.code[at][0] == program.QUANTIZE for _, at in places)
        widths = (spec.width, heads, spec.width, spec.ffn_width)
        forward.watch = {at + 1: look(at, widths[place]) for (_, place), at in places}
        forward.cache.length = 0
        forward.run(tokens)
        for (layer, place), at in places:
            assert seen[at] == pytest.approx(found.zeros[layer][place], abs=0.15)


@pytest.mark.compiled
def test_greedy_levels_cost_less_than_equal_ones() -> None:
    """One matrix of the feed-forward is nothing: zeros belong where it would meet them."""
    weights = inputs.tiny_weights(SPEC, lambda tensor: "f32")
    data = weights.data.copy()
    for layer in range(SPEC.layers):
        tensor = weights.tensors[f"layers.{layer}.down"]
        data[tensor.offset : tensor.offset + tensor.nbytes] = 0
    data.flags.writeable = False
    windows = [[int(t) for t in inputs.whole(("w", i), 0, SPEC.vocab - 1, 32)] for i in range(2)]
    whole = type(weights)(SPEC, data, weights.tensors)
    found = find_inputs(whole, EngineConfig(1, 80, 32), windows, 0.25)
    for zeros in found.zeros:
        assert zeros[QKV] == zeros[OUT] == 0  # gate, up and down change nothing here
        assert max(zeros[UP], zeros[DOWN]) > 0.3


@pytest.mark.compiled
def test_thresholds_apply_unless_they_are_refused_and_a_draft_makes_up_for_them(teal: Path) -> None:
    tokens, found, told = tiny_models.tokens(40), {}, {}
    for name, options in {"none": {"sparsity": "none"}, "auto": {}, "draft": {"draft": "sparse"}}.items():
        with edgert.load(teal / "m.ert", threads=1, **options) as model:  # type: ignore[arg-type]
            told[name] = model.generate(tokens[:18], max_tokens=30, temperature=1.2, seed=3).tokens
            found[name] = model.logits(tokens)
    edgert.convert(teal / "model", teal / "whole.ert", "q8", calibrate=teal / "text.txt")
    with edgert.load(teal / "whole.ert", threads=1) as model:
        inputs.same(found["none"], model.logits(tokens))
    inputs.same(found["auto"][:WHOLE_AT_START], found["none"][:WHOLE_AT_START])
    assert not np.allclose(found["auto"][WHOLE_AT_START:], found["none"][WHOLE_AT_START:], atol=1e-2)
    assert told["draft"] == told["none"] != told["auto"]


@pytest.mark.compiled
def test_the_command_says_what_it_cost(teal: Path, tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "m.ert"
    arguments = ("convert", teal / "model", "-o", out, "--quant", "q8", "--calibrate", teal / "text.txt")
    done = cli(*arguments, "--sparsity", "teal:0.4")
    assert done.status == 0, done.err
    assert "with teal:0.4: perplexity on the text" in done.out
    assert "inputs taken for zero, 40% wanted" in cli("inspect", out).out
    assert json.loads(cli("inspect", out, "--json").out)["inputs"]["share"] == 0.4
    assert [path.name for path in tmp_path.iterdir()] == ["m.ert"]
    assert cli(*arguments, "--sparsity", "teal:1").status == 2


@pytest.mark.compiled
def test_what_cannot_have_thresholds_is_refused(teal: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs a text to find its thresholds"):
        edgert.convert(teal / "model", tmp_path / "m.ert", "q8", sparsity="teal:0.4")
    for wrong in ("teal:", "teal:1", "teal:much", "teal:0"):
        with pytest.raises(OptionError, match=r"expected a share above 0 and up to 0.9"):
            edgert.convert(
                *(teal / "model", tmp_path / "m.ert", "q8"), sparsity=wrong, calibrate=teal / "text.txt"
            )
    tiny_models.write_folder(tmp_path / "experts", "olmoe_mha")
    with pytest.raises(OptionError, match="expected a model without experts"):
        edgert.convert(
            *(tmp_path / "experts", tmp_path / "m.ert", "q8"),
            sparsity="teal:0.4",
            calibrate=teal / "text.txt",
        )
    (tmp_path / "short.jsonl").write_text('{"text": "the cat"}\n' * 40)
    with pytest.raises(UsageError, match="no document longer than"):
        edgert.convert(
            *(teal / "model", tmp_path / "m.ert", "q8"),
            sparsity="teal:0.4",
            calibrate=tmp_path / "short.jsonl",
        )
    assert not (tmp_path / "m.ert").exists()


# ---- feed-forwards that are left out ---------------------------------------------------------


@pytest.mark.parametrize("quant", ["q8", "f32"])
def test_a_feed_forward_that_is_left_out_is_as_if_its_matrix_were_zero(quant: str) -> None:
    weights = inputs.tiny_weights(SPEC, lambda tensor: quant)
    data, tensor = weights.data.copy(), weights.tensors["layers.1.down"]
    data[tensor.offset : tensor.offset + tensor.nbytes] = 0
    data.flags.writeable = False
    tokens = [int(t) for t in inputs.whole("tokens", 0, SPEC.vocab - 1, 24)]
    with closing(Forward(type(weights)(SPEC, data, weights.tensors), EngineConfig(1, 80, 32))) as model:
        expected = model.run(tokens, outputs=range(24)).copy()
    left_out = ((0.0,) * 4, (0.0, 0.0, 0.0, LEFT_OUT))
    for rows in (1, 7, 24):
        inputs.same(logits(quant, left_out, rows), expected)
    # Chunks with rows that are computed whole, and without, give the same.
    inputs.same(logits(quant, left_out, 7, whole=10), logits(quant, left_out, 1, whole=10))
    inputs.same(logits(quant, left_out, 1, whole=1 << 40), logits(quant, (), 1))


def test_what_is_left_out_is_not_computed() -> None:
    weights = inputs.tiny_weights(SPEC, lambda tensor: "q8")
    left_out = ((0.0,) * 4, (0.0, 0.0, 0.0, LEFT_OUT))
    with closing(Forward(weights, EngineConfig(1, 80, 32, inputs=left_out))) as model:
        model.whole = 2
        counts = [0, 0]
        for layer, (start, _) in model.feed_forwards.items():
            model.watch[start + 1] = partial(_count, counts, layer)
        for token in (3, 1, 4, 1, 5):
            model.run([token])
    assert counts == [5, 2]


def _count(counts: list[int], layer: int, rows: int) -> None:
    counts[layer] += rows


def nearly_still(layer: int) -> Any:
    """A model whose feed-forward of this layer adds next to nothing."""
    spec = replace(SPEC, layers=4)
    weights = inputs.tiny_weights(spec, lambda tensor: "f32")
    data, tensor = weights.data.copy(), weights.tensors[f"layers.{layer}.down"]
    view = data[tensor.offset : tensor.offset + tensor.nbytes].view(np.float32)
    view *= np.float32(1e-3)
    data.flags.writeable = False
    return type(weights)(spec, data, weights.tensors)


WINDOWS = [[int(t) for t in inputs.whole(("w", i), 0, SPEC.vocab - 1, 24)] for i in range(2)]


def test_the_feed_forward_that_changes_least_is_left_out() -> None:
    weights = nearly_still(2)
    found = cosines(weights, EngineConfig(1, 80, 32), WINDOWS)
    assert found[2] > 0.999 and max(found[[0, 1, 3]]) < 0.98
    levels = find_skips(weights, EngineConfig(1, 80, 32), WINDOWS, 0.9)
    assert [row[DOWN] for row in levels.thresholds] == [0, 0, LEFT_OUT, 0]
    assert [sum(row) for row in levels.zeros] == [0, 0, 1, 0]


@pytest.mark.parametrize("layer", [0, 3])
def test_a_model_in_which_nothing_saturates_is_refused(layer: int) -> None:
    """Not even where the first or the last layer does: those remain."""
    with pytest.raises(OptionError, match="hardly changes its rows"):
        find_skips(nearly_still(layer), EngineConfig(1, 80, 32), WINDOWS, 0.5)
