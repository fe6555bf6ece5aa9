"""Gates of neurons that a predictor expects to be silent are left out, and nothing else is."""

import json
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import edgert
from edgert.config import EngineConfig, ModelSpec
from edgert.converters import describe_folder
from edgert.errors import ConversionError, FormatError, OptionError
from edgert.format import ErtFile
from edgert.format.predictors import read_predictors
from edgert.format.verify import check
from edgert.kernels import gate_rows, neuron_packing, neurons, program
from edgert.kernels.reference import gate_rows as twins
from edgert.model.forward import WHOLE_AT_START, Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import tiny_models
from tests.neuron_weights import one_by_one, without_gates

CONTEXT = 80
# Widths that fill no span, slice, block or cluster; the second layer of the first has no predictor.
SMALL = ModelSpec("llama", 2, 40, 4, 2, 10, 72, 83, CONTEXT, 1e-5, "relu")
WIDE = ModelSpec("qwen3", 2, 544, 4, 2, 16, 100, 67, CONTEXT, 1e-5, "relu2", True, True, qk_norm=True)
SPECS = {"small": (SMALL, (32, 0)), "wide": (WIDE, (32, 64))}
NAMES = ["small"] if numba.config.DISABLE_JIT else list(SPECS)
ROWS = (1, 2, 9) if numba.config.DISABLE_JIT else (1, 2, 3, 8, 9, 20)
SURE = np.float32(1e6)


@cache
def dense(name: str, quant: str) -> Weights:
    return inputs.tiny_weights(SPECS[name][0], lambda tensor: quant)


def bias_of(name: str, share: float) -> Any:
    """Far above zero for a share of the neurons, far below for the others."""
    drawn = inputs.raw((name, "kept"), SPECS[name][0].ffn_width) < 256 * share
    return np.where(drawn, SURE, -SURE)


def logits(weights: Weights, rows: int, threads: int = 1, whole: int = 0, **options: Any) -> Any:
    """Of 40 tokens, given `rows` at a time; predictors apply from position `whole` on."""
    tokens = [int(t) for t in inputs.whole("tokens", 0, weights.spec.vocab - 1, 40)]
    config = EngineConfig(threads, CONTEXT, 32, "f16", **options)
    with closing(Forward(weights, config)) as model:
        model.whole = whole
        return np.concatenate(
            [
                model.run(tokens[i : i + rows], outputs=range(len(tokens[i : i + rows]))).copy()
                for i in range(0, 40, rows)
            ]
        )


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_expected_is_as_if_its_gate_were_zero(name: str, quant: str) -> None:
    spec, ranks = SPECS[name]
    bias = bias_of(name, 0.5)
    predicted = one_by_one(dense(name, quant), ranks, bias)
    if all(ranks):
        expected = logits(without_gates(dense(name, quant), bias > 0), 20)
    else:  # of one layer only
        both = without_gates(dense(name, quant), bias > 0)
        data, gate = dense(name, quant).data.copy(), both.tensors["layers.0.gate"]
        data[gate.offset : gate.offset + gate.nbytes] = both.data[gate.offset : gate.offset + gate.nbytes]
        expected = logits(Weights(spec, data, both.tensors), 20)
    assert not np.array_equal(expected, logits(dense(name, quant), 20))
    for rows in ROWS:
        inputs.same(logits(predicted, rows, predict=True), expected)


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_computed_whole_it_gives_the_bits_of_whole_matrices(name: str, quant: str) -> None:
    expected = logits(dense(name, quant), 20)
    silent = one_by_one(dense(name, quant), SPECS[name][1], bias_of(name, 0.1))
    for rows in ROWS:
        inputs.same(logits(silent, rows), expected)  # nobody asks the predictors
        inputs.same(logits(silent, rows, predict=True, whole=1 << 40), expected)
    cut = logits(silent, 1, predict=True, whole=WHOLE_AT_START)
    inputs.same(cut[:WHOLE_AT_START], expected[:WHOLE_AT_START])
    assert not np.array_equal(cut[WHOLE_AT_START:], expected[WHOLE_AT_START:])


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_a_row_decide_for_that_row_alone(name: str) -> None:
    """Scores near zero: every row expects other neurons. Neither rows beside it nor threads change one."""
    weights = one_by_one(dense(name, "q4"), SPECS[name][1], np.zeros(SPECS[name][0].ffn_width))
    alone = logits(weights, 1, predict=True, whole=5)
    assert not np.array_equal(alone, logits(weights, 1))
    for rows in ROWS[1:]:
        inputs.same(logits(weights, rows, predict=True, whole=5), alone)
    inputs.same(logits(weights, 3, threads=3, predict=True, whole=5), alone)


@pytest.mark.compiled
def test_long_units_of_gates_compute_what_is_expected() -> None:
    spec = replace(SMALL, layers=1, ffn_width=2100)
    whole = inputs.tiny_weights(spec, lambda tensor: "q4")
    kept = inputs.raw("many", spec.ffn_width) < 192
    assert kept.sum() >= neurons.MANY
    predicted = one_by_one(whole, (32,), np.where(kept, SURE, -SURE))
    expected = logits(without_gates(whole, kept), 20)
    for rows, threads in ((1, 1), (1, 2), (3, 2)):
        inputs.same(logits(predicted, rows, threads, predict=True), expected)


def test_only_the_gates_that_are_expected_are_computed() -> None:
    weights = one_by_one(dense("small", "q4"), (32, 0), bias_of("small", 0.25))
    with closing(Forward(weights, EngineConfig(1, CONTEXT, 32, predict=True))) as model:
        model.whole = 0
        model.run([3, 1], outputs=[1])
        expected = int((bias_of("small", 0.25) > 0).sum())
        assert model.gated == (expected, SMALL.ffn_width)  # one of the two layers has a predictor
        live = next(row for row in model.code if row[0] == program.PREDICTED)[9]
        wanted = model.state.routes[live + 1 : live + 1 + expected]
        assert wanted.tolist() == np.flatnonzero(bias_of("small", 0.25) > 0).tolist()


@inputs.some
@given(seed=inputs.seeds, rows=st.integers(1, 3), groups=st.integers(1, 4), flavour=inputs.flavours)
def test_neurons_with_a_score_above_zero_are_listed(seed: int, rows: int, groups: int, flavour: str) -> None:
    s = inputs.floats((seed, "s"), flavour, rows * 32 * groups)
    found, expected = np.full(200, 7, np.int64), np.full(200, 7, np.int64)
    gate_rows.list_positive(s, 0, 32 * groups, rows, groups, found, 3)
    positive = np.flatnonzero((s.reshape(rows, -1) > 0).any(axis=0))
    expected[3 : 4 + positive.size] = [positive.size, *positive]
    inputs.same(found, expected)
    twins.list_positive(s, 0, 32 * groups, rows, groups, found, 3)
    inputs.same(found, expected)
    f = np.concatenate([inputs.floats((seed, "g"), flavour, s.size), s])
    theirs = f.copy()
    gate_rows.silence(f, 0, s.size, s.size)
    twins.silence(theirs, 0, s.size, s.size)
    inputs.same(f, theirs)
    inputs.same(f[: s.size], np.where(s > 0, f[: s.size], np.float32(0)))


# ---- files -----------------------------------------------------------------------------------


def write_predictors(path: Path, folder: Path, bias: Any, ranks: tuple[int, ...], **changes: Any) -> None:
    """What `edgert train predictor` writes, with these scores wherever x is."""
    described = describe_folder(folder)
    width, layers = described.spec.width, [i for i, rank in enumerate(ranks) if rank]
    tensors = {}
    for i in layers:
        tensors[f"layers.{i}.predictor_in"] = np.zeros((ranks[i], width), np.float16)
        tensors[f"layers.{i}.predictor_out"] = np.zeros((bias.size, ranks[i]), np.float16)
        tensors[f"layers.{i}.predictor_out_bias"] = np.asarray(bias, np.float32)
    shares = [0.5 if rank else 0.0 for rank in ranks]
    worth = {"perplexity": [5.0, 5.5], "recall": shares, "predicted": shares, "firing": shares}
    metadata = {"predictors": json.dumps(worth), "model": described.fingerprint} | changes
    save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with ReLU squared, a text, and predictors that expect every second neuron."""
    folder = tmp_path_factory.mktemp("relu")
    tiny_models.write_folder(folder / "model", "llama_relu2")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog ran to the cat " * 30)
    spec = describe_folder(folder / "model").spec
    bias = np.where(np.arange(spec.ffn_width) % 2 == 0, 1.0, -1.0)
    write_predictors(folder / "p.safetensors", folder / "model", bias, (32,) * spec.layers)
    edgert.convert(folder / "model", folder / "m.ert", "q8", predictor=folder / "p.safetensors")
    return folder


def test_predictors_are_in_the_file_and_apply_unless_they_are_refused(folder: Path) -> None:
    with ErtFile.open(folder / "m.ert") as file:
        assert set(file.spec.predictors) == {32}
        assert file.predictors is not None and file.predictors.perplexity == (5.0, 5.5)
        assert file.tensors["layers.0.gate"].layout == "rows1"
    assert check(folder / "m.ert") > 10
    tokens = tiny_models.tokens(40)
    found = {}
    for sparsity in ("auto", "none"):
        with edgert.load(folder / "m.ert", threads=1, sparsity=sparsity) as model:  # type: ignore[arg-type]
            found[sparsity] = model.logits(tokens)
            if sparsity == "auto":
                stats = model.generate(tokens, max_tokens=4).stats
                assert stats["gates_read"] == 0.5 and stats["neurons_read"] < 0.4
    edgert.convert(folder / "model", folder / "whole.ert", "q8", sparsity="exact")
    with edgert.load(folder / "whole.ert", threads=1) as model:
        inputs.same(found["none"], model.logits(tokens))
    assert np.array_equal(found["auto"][:WHOLE_AT_START], found["none"][:WHOLE_AT_START])
    assert not np.allclose(found["auto"][WHOLE_AT_START:], found["none"][WHOLE_AT_START:], atol=1e-2)


@pytest.mark.compiled
def test_hottest_first_moves_scores_with_their_neurons(folder: Path, tmp_path: Path) -> None:
    edgert.convert(
        *(folder / "model", tmp_path / "m.ert", "q8"),
        predictor=folder / "p.safetensors",
        calibrate=folder / "text.txt",
    )
    tokens, found = tiny_models.tokens(40), []
    for path in (folder / "m.ert", tmp_path / "m.ert"):
        with edgert.load(path, threads=1) as model:
            found.append(model.logits(tokens))
    assert np.allclose(*found, atol=0.05 * np.abs(found[0]).max())
    assert not np.array_equal(*found)


def test_verified_the_output_is_that_of_the_whole_model(folder: Path) -> None:
    prompt, told = tiny_models.tokens(18), {}
    for name, options in {"whole": {"sparsity": "none"}, "fast": {}, "draft": {"draft": "sparse"}}.items():
        with edgert.load(folder / "m.ert", threads=1, **options) as model:  # type: ignore[arg-type]
            told[name] = model.generate(prompt, max_tokens=30, temperature=1.2, seed=3)
    assert told["draft"].tokens == told["whole"].tokens != told["fast"].tokens
    assert told["draft"].stats["drafted"] > 0


@pytest.mark.compiled
def test_the_command_says_what_they_cost(folder: Path, tmp_path: Path, cli: Any) -> None:
    out = tmp_path / "m.ert"
    arguments = (folder / "model", "-o", out, "--quant", "q8", "--predictor", folder / "p.safetensors")
    done = cli("convert", *arguments)
    assert done.status == 0, done.err
    assert "perplexity on held-out text 5.000 -> 5.500 (+10.00%)" in done.out
    assert "layer 0   rank 32, expects 50.0% of the neurons" in cli("inspect", out).out
    assert json.loads(cli("inspect", out, "--json").out)["predictors"]["recall"][0] == 0.5
    done = cli("convert", *arguments, "--calibrate", folder / "text.txt")
    assert "with what the predictors miss: perplexity on the text" in done.out
    assert cli("convert", *arguments, "--sparsity", "none").status == 2


def test_predictors_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    model, path = folder / "model", tmp_path / "p.safetensors"
    spec = describe_folder(model).spec
    bias, ranks = np.ones(spec.ffn_width), (32,) * spec.layers

    def convert(**options: Any) -> None:
        edgert.convert(model, tmp_path / "m.ert", "q8", predictor=path, **options)

    for changes, message in (
        ({"model": "0" * 64}, "predictors of another model"),
        ({"predictors": "{}"}, "F33 predictors"),
    ):
        write_predictors(path, model, bias, ranks, **changes)
        with pytest.raises(ConversionError, match=message):
            convert()
    write_predictors(path, model, bias, (33, *ranks[1:]))
    with pytest.raises(ConversionError, match="a predictor of rank 33 for layer 0"):
        convert()
    write_predictors(path, model, bias[1:], ranks)
    with pytest.raises(ConversionError, match=r"layers.0.predictor_out of shape"):
        convert()
    write_predictors(path, model, bias, ranks)
    with pytest.raises(OptionError, match="sparsity is none with predictors"):
        convert(sparsity="none")
    save_file({"layers.0.gate": bias}, path)
    with pytest.raises(ConversionError, match="expected predictors and what they are worth"):
        convert()


GOOD: dict[str, Any] = {"perplexity": [5, 5.5], "recall": [0.9, 0], "predicted": [0.2, 0], "firing": [0.1, 0]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"perplexity": [5]},
        {"perplexity": [0.5, 1]},
        {"perplexity": [5, 1e31]},
        {"recall": [0.9]},
        {"recall": [0.9, 1.1]},
        {"predicted": "many"},
        {"firing": [0.1, None]},
        {"firing": [0.1, True]},
        {"more": 1},
    ],
    ids=str,
)
def test_damaged_worth_is_refused(wrong: dict[str, Any]) -> None:
    found = read_predictors(json.dumps(GOOD), (32, 0))
    assert found is not None and json.loads(json.dumps(found.to_json())) == GOOD
    with pytest.raises(FormatError, match="F33 predictors"):
        read_predictors(json.dumps(GOOD | wrong), (32, 0))


def test_worth_and_ranks_come_together() -> None:
    assert read_predictors(None, ()) is None
    for text, ranks in ((None, (32,)), (json.dumps(GOOD), ())):
        with pytest.raises(FormatError, match="F33 predictors"):
            read_predictors(text, ranks)
    for ranks in ((32,), (0, 0), (31, 32), (-32, 32), (32, 1 << 20), (True, 32)):
        with pytest.raises(ValueError, match="predictors is"):
            ModelSpec("llama", 2, 40, 4, 2, 10, 72, 83, 80, 1e-5, "relu", neurons=True, predictors=ranks)
    with pytest.raises(ValueError, match="without neurons"):
        ModelSpec("llama", 2, 40, 4, 2, 10, 72, 83, 80, 1e-5, "relu", predictors=(32, 32))
