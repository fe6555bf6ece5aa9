"""Leaving out the neurons that do not fire changes no bit, however rows are grouped and whoever computes."""

from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import edgert
from edgert.config import QUANTS, EngineConfig, ModelSpec
from edgert.converters.neurons import LEAST_WIDTH, with_sparsity
from edgert.errors import FormatError, OptionError
from edgert.format import ErtFile
from edgert.format.tensors import neurons_name
from edgert.kernels import neuron_packing, neurons
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import tiny_models
from tests.neuron_weights import one_by_one

CONTEXT = 80
# Widths that fill no span, slice, block or cluster; a head for an exit on the way.
SMALL = ModelSpec("llama", 2, 40, 4, 2, 10, 72, 83, CONTEXT, 1e-5, "relu")
WIDE = ModelSpec("qwen3", 2, 544, 4, 2, 16, 100, 67, CONTEXT, 1e-5, "relu2", True, True, qk_norm=True)
ODD = ModelSpec("mistral", 3, 172, 5, 1, 24, 45, 99, CONTEXT, 1e-5, "relu", exits=(1, 2))
SPECS = {"small": SMALL, "wide": WIDE, "odd": ODD}
NAMES = ["small"] if numba.config.DISABLE_JIT else list(SPECS)
ROWS = (1, 2, 9) if numba.config.DISABLE_JIT else (1, 2, 3, 8, 9, 20)


@cache
def both(name: str, quant: str) -> tuple[Weights, Weights]:
    dense = inputs.tiny_weights(SPECS[name], lambda tensor: quant)
    return dense, one_by_one(dense)


def forward(weights: Weights, threads: int, **options: Any) -> Forward:
    return Forward(weights, EngineConfig(threads, CONTEXT, 32, "f16", **options))


def logits(weights: Weights, rows: int, threads: int = 1, **options: Any) -> Any:
    """Of 40 tokens, given `rows` at a time."""
    tokens = [int(t) for t in inputs.whole("tokens", 0, weights.spec.vocab - 1, 40)]
    with closing(forward(weights, threads, **options)) as model:
        return np.concatenate(
            [
                model.run(tokens[i : i + rows], outputs=range(len(tokens[i : i + rows]))).copy()
                for i in range(0, 40, rows)
            ]
        )


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_neurons_give_the_bits_of_whole_matrices(name: str, quant: str) -> None:
    dense, sparse = both(name, quant)
    expected = logits(dense, 20)
    for rows in ROWS:
        inputs.same(logits(sparse, rows), expected)


@pytest.mark.compiled
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_change_no_bit(threads: int) -> None:
    for name in NAMES:
        dense, sparse = both(name, "q4")
        for rows in (1, 4, 20):
            inputs.same(logits(sparse, rows, threads), logits(dense, 20))


@pytest.mark.compiled
def test_long_units_give_the_bits_of_whole_matrices() -> None:
    spec = replace(SMALL, layers=1, ffn_width=2600)
    dense = inputs.tiny_weights(spec, lambda tensor: "q4")
    sparse = one_by_one(dense)
    expected = logits(dense, 20)
    for rows, threads in ((1, 1), (1, 2), (3, 2)):
        inputs.same(logits(sparse, rows, threads), expected)
    with closing(forward(sparse, 1)) as model:
        model.run([3])
        assert model.fired[0] >= neurons.MANY


def test_a_tree_gives_the_bits_of_whole_matrices() -> None:
    for rows in (5, 12):  # neuron by neuron, and not
        parents = [-1, 0, 0, 1, 2, 2, 3, 3, -1, 8, 8, 10][:rows]
        found = []
        for weights in both("small", "q8"):
            with closing(forward(weights, 1)) as model:
                model.run([3, 1, 4, 1, 5])
                tokens = [int(t) for t in inputs.whole("tree", 0, weights.spec.vocab - 1, rows)]
                found.append(model.run(tokens, parents=parents, outputs=range(rows)).copy())
        inputs.same(*found)


def test_an_exit_gives_the_bits_of_whole_matrices() -> None:
    found = []
    for weights in both("odd", "q8"):
        with closing(forward(weights, 1)) as model:
            first = model.run([3, 1, 4], outputs=[2], layers=(0, 2)).copy()
            found.append(np.concatenate([first, model.run([3, 1, 4], outputs=[2], layers=(2, 3))]))
    inputs.same(*found)


def test_thresholds_change_results_alike_on_every_path() -> None:
    _, sparse = both("small", "q4")
    thresholds = (0.5, 0.25)
    cut = logits(sparse, 20, thresholds=thresholds)
    assert not np.array_equal(cut, logits(sparse, 20))
    for rows in (1, 3):
        inputs.same(logits(sparse, rows, thresholds=thresholds), cut)


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
def test_a_converted_model_gives_the_same_either_way(quant: Any, tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "model", "llama_relu2")
    found = []
    for sparsity in ("exact", "none"):
        edgert.convert(tmp_path / "model", tmp_path / "m.ert", quant, sparsity=sparsity)
        with ErtFile.open(tmp_path / "m.ert") as file:
            assert file.spec.neurons == (sparsity == "exact")
            assert (neurons_name(0) in file.tensors) == (sparsity == "exact")
        with edgert.load(tmp_path / "m.ert", threads=1) as model:
            found.append(model.logits([1, 5, 7, 9]))
            read = model.generate([1, 5, 7, 9], max_tokens=4).stats.get("neurons_read")
            assert read is None if sparsity == "none" else 0.2 < read < 0.8
    inputs.same(*found)


@pytest.mark.parametrize("width", [LEAST_WIDTH, LEAST_WIDTH - 32])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_fires_rarely_is_stored_neuron_by_neuron_where_it_is_wide(width: int, activation: Any) -> None:
    spec = replace(SMALL, width=width, activation=activation)
    for quant in QUANTS:
        fits = activation == "relu" and quant in neuron_packing.QUANTS and width == LEAST_WIDTH
        assert with_sparsity(spec, quant, "auto").neurons == fits
        assert not with_sparsity(spec, quant, "none").neurons
    experts = replace(spec, experts=4, active_experts=2, expert_width=32)
    assert not with_sparsity(experts, "q4", "auto").neurons


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "silu", "llama_gqa_tied")
    tiny_models.write_folder(tmp_path / "relu", "llama_relu2")
    for folder, quant in (("silu", "q4"), ("relu", "f16")):
        with pytest.raises(OptionError, match="sparsity is exact for a model with"):
            edgert.convert(tmp_path / folder, tmp_path / "m.ert", quant, sparsity="exact")
    with pytest.raises(OptionError, match="sparsity is 'some'"):
        edgert.convert(tmp_path / "relu", tmp_path / "m.ert", "q4", sparsity="some")  # type: ignore[arg-type]


def test_damaged_neurons_are_found(tmp_path: Path) -> None:
    tiny_models.write_folder(tmp_path / "model", "llama_relu2")
    edgert.convert(tmp_path / "model", tmp_path / "m.ert", "q4", sparsity="exact")
    data = bytearray((tmp_path / "m.ert").read_bytes())
    at = data.index(b'\\"layout\\":\\"neurons32\\"')
    data[at : at + 22] = data[at : at + 22].replace(b"neurons32", b"gated16  ")
    (tmp_path / "bad.ert").write_bytes(data)
    with pytest.raises(FormatError, match="layout"):
        ErtFile.open(tmp_path / "bad.ert")
