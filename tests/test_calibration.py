"""Calibration: what is seen of a model at work, and what a conversion makes of it."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgert
from edgert.calibration import Walk
from edgert.calibration.statistics import Grams
from edgert.calibration.taps import find_taps
from edgert.calibration.text import Text, read_text
from edgert.config import EngineConfig, ModelSpec
from edgert.errors import UsageError
from edgert.format import ErtFile
from edgert.format.tensors import matrices_in
from edgert.model.forward import Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests import tiny_models

DENSE = ModelSpec("qwen3", 2, 48, 4, 2, 12, 80, 67, 40, 1e-6, qk_norm=True, exits=(1,))
TIED = ModelSpec("llama", 2, 40, 5, 1, 8, 44, 50, 40, 1e-5, "relu", tied_embeddings=True)
EXPERTS = ModelSpec(
    *("qwen2_moe", 2, 48, 4, 2, 12, 80, 67, 40, 1e-6),
    qkv_bias=True,
    experts=5,
    active_experts=2,
    expert_width=40,
    shared_width=56,
    dense_layers=(1,),
)
LATENT = ModelSpec(
    *("deepseek_v3", 2, 48, 4, 1, 48, 80, 67, 40, 1e-6),
    rotary=16,
    latent=32,
    query_latent=24,
    plain_dim=32,
    value_dim=16,
    experts=6,
    active_experts=2,
    expert_width=40,
    shared_width=56,
    open_shared=True,
    sigmoid_routing=True,
    routing_groups=3,
    active_groups=2,
    dense_layers=(1,),
)
WINDOWS = ([1, 5, 9, 22, 41, 3, 7], [30, 31, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20])
CHUNK = 8  # the second window takes two


class Seen:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.rows: dict[str, list[NDArray[np.float32]]] = defaultdict(list)

    def see(self, names: tuple[str, ...], rows: NDArray[np.float32]) -> None:
        for name in names:
            self.rows[name].append(rows.copy())

    def see_gates(self, layer: int, rows: Any) -> None:
        self.gates = [*getattr(self, "gates", []), (layer, rows.copy())]

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return np.concatenate(self.rows[name]).astype(np.float64)


def weights_of(spec: ModelSpec) -> Weights:
    return inputs.tiny_weights(spec, lambda name: "f32")


def matrix(weights: Weights, name: str) -> NDArray[np.float64]:
    """A stored f32 matrix, decoded by hand."""
    rows, columns = weights.tensors[name].shape
    found = weights.matrix(name)
    return inputs.stored_matrix("f32", weights.data, found.at, found.groups, rows, columns)


def vector(weights: Weights, name: str) -> NDArray[np.float64]:
    tensor = weights.tensors[name]
    data = weights.data[tensor.offset : tensor.offset + tensor.nbytes]
    return np.frombuffer(data.tobytes(), "<f4").astype(np.float64)


def walked(spec: ModelSpec) -> tuple[Weights, Seen, list[NDArray[np.float32]]]:
    """All layers and the output of a model, seen, and the hidden rows before each layer and at the end."""
    weights, seen, hidden = weights_of(spec), Seen(), []
    forward = Forward(weights, EngineConfig(threads=2, context=40, chunk=CHUNK))
    try:
        walk = Walk(forward, weights, WINDOWS)
        for _ in range(spec.layers):
            walk.layer([seen])
            hidden.append(walk.hidden.copy())
        walk.output([seen])
    finally:
        forward.close()
    return weights, seen, hidden


def normed(rows: NDArray[Any], gain: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    x = rows.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * gain


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("spec", [DENSE, TIED, EXPERTS], ids=["dense", "tied", "experts"])
def test_a_walk_by_layers_gives_the_bits_of_whole_forwards(spec: ModelSpec) -> None:
    weights, _, hidden = walked(spec)
    forward = Forward(weights, EngineConfig(threads=1, context=40, chunk=16))
    try:
        expected = []
        for window in WINDOWS:
            forward.cache.length = 0
            expected.append(forward.run(window).copy())
    finally:
        forward.close()
    inputs.same(hidden[-1], np.concatenate(expected))


def test_what_dense_matrices_meet() -> None:
    weights, seen, hidden = walked(DENSE)
    for name in ("q", "k", "v"):
        gain = vector(weights, "layers.1.attention_norm")
        np.testing.assert_allclose(
            seen[f"layers.1.{name}"], normed(hidden[0], gain, 1e-6), rtol=1e-4, atol=1e-5
        )
    x = seen["layers.1.gate"]
    gate, up = x @ matrix(weights, "layers.1.gate").T, x @ matrix(weights, "layers.1.up").T
    np.testing.assert_allclose(seen["layers.1.down"], silu(gate) * up, rtol=1e-3, atol=1e-5)
    # What the two matrices that write to the residual meet accounts for all that the layer adds.
    added = seen["layers.1.o"] @ matrix(weights, "layers.1.o").T
    added += seen["layers.1.down"] @ matrix(weights, "layers.1.down").T
    np.testing.assert_allclose(added, hidden[1].astype(np.float64) - hidden[0], rtol=1e-3, atol=1e-4)
    expected = normed(hidden[1], vector(weights, "output_norm"), 1e-6)
    np.testing.assert_allclose(seen["output"], expected, rtol=1e-4, atol=1e-5)
    assert "token_embedding" not in seen.rows  # looked up, not multiplied
    assert "exits.1.matrix" not in seen.rows


def test_a_tied_embedding_meets_what_the_output_matrix_meets() -> None:
    weights, seen, hidden = walked(TIED)
    expected = normed(hidden[1], vector(weights, "output_norm"), 1e-5)
    np.testing.assert_allclose(seen["token_embedding"], expected, rtol=1e-4, atol=1e-5)


def test_what_experts_meet() -> None:
    """A row is seen by the down of just the experts that its router prefers, in their own activations."""
    weights, seen, _ = walked(EXPERTS)
    x = seen["layers.0.router"]
    np.testing.assert_array_equal(x, seen["layers.0.shared_gate"])
    chosen = np.argsort(-(x @ matrix(weights, "layers.0.router").T), axis=1)[:, :2]
    width, ffn = EXPERTS.width, EXPERTS.expert_width
    for expert in range(EXPERTS.experts):
        rows = x[(chosen == expert).any(axis=1)]
        name = f"layers.0.experts.{expert}"
        at = weights.tensors[name].offset
        gate, up = (
            inputs.stored_matrix("f32", weights.data, at + part * 3 * 2 * 2048, 2, ffn, width)
            for part in (0, 1)
        )
        expected = silu(rows @ gate.T) * (rows @ up.T)
        found = seen[f"{name}.down"] if len(rows) else np.zeros((0, ffn))
        # Chunks apart, rows are in the order of the text.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert sum(len(np.concatenate(seen.rows[n])) for n in seen.rows if "experts" in n) == len(x) * 2


def test_watching_changes_no_bit() -> None:
    weights = weights_of(EXPERTS)
    forward = Forward(weights, EngineConfig(threads=2, context=40, chunk=16))
    try:
        plain = forward.run(WINDOWS[1], outputs=[0, 11]).copy()
        counts: list[int] = []
        forward.watch = dict.fromkeys(range(len(forward.code)), counts.append)
        forward.cache.length = 0
        inputs.same(forward.run(WINDOWS[1], outputs=[0, 11]), plain)
    finally:
        forward.close()
    assert set(counts) == {12, 2}  # rows of the layers, and of the head
    assert len(counts) == len(forward.code)


def test_grams_are_the_mean_of_products() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((count, 24)).astype(np.float32) for count in (700, 900))
    grams = Grams()
    grams.see(("q", "k"), a)
    grams.see(("o",), b[:5])
    grams.see(("q", "k"), b)
    both = np.concatenate([a, b]).astype(np.float64)
    expected = both.T @ both / 1600
    found = grams.mean("q")
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert grams.mean("k") is found
    assert (grams.rows("k"), grams.rows("o"), grams.rows("v")) == (1600, 5, 0)
    assert grams.mean("v") is None
    grams.clear()
    assert grams.mean("q") is None


class Letters:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> Sequence[int]:
        return [ord(letter) for letter in text]


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def text_of(path: Path, window: int, tokens: int) -> Text:
    return read_text(path, Letters(), window, tokens)  # type: ignore[arg-type]


def test_windows_come_from_the_whole_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", [chr(65 + i) * 50 for i in range(20)])
    text = text_of(path, 30, 250)
    assert {len(window) for window in text.windows} <= {30, 20}
    assert 200 <= text.tokens <= 270  # whole windows
    assert (text.windows[0][0], text.windows[-1][0]) == (65, 84)
    assert text_of(path, 30, 10**6).tokens == 1000
    record = json.loads(text.metadata()["calibration"])
    assert record["text"] == "t.jsonl"
    assert record["tokens"] == text.tokens
    other = write_lines(tmp_path / "u.jsonl", [chr(66 + i) * 50 for i in range(20)])
    assert text_of(other, 30, 250).sha256 != text.sha256


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found 60 tokens, expected at least 64 to calibrate with"):
        text_of(write_lines(tmp_path / "t.jsonl", ["a" * 60]), 30, 100)


@pytest.mark.compiled
def test_calibrated_file_says_with_what_and_loses_less(
    tiny_folder: Path, tiny_file: Path, tmp_path: Path
) -> None:
    alphabet = "abc defghij. klm nopq rstuvw xyz ABC DEF"
    text = write_lines(tmp_path / "t.jsonl", [alphabet[i:] + alphabet[:i] for i in range(40)])
    plain, calibrated = tmp_path / "plain.ert", tmp_path / "calibrated.ert"
    edgert.convert(tiny_folder, plain, "q4")
    report = edgert.convert(tiny_folder, calibrated, "q4", calibrate=text)
    assert [t.name for t in report.tensors][:2] == ["token_embedding", "rope_frequencies"]
    with ErtFile.open(calibrated) as file:
        assert json.loads(file.metadata["calibration"])["tokens"] == 40 * len(alphabet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrated.ert", "plain.ert", "t.jsonl"]
    errors = []
    for path in (plain, calibrated):
        with edgert.load(path, threads=1) as model, edgert.load(tiny_file, threads=1) as exact:
            ids = exact.tokenizer.encode(alphabet[7:] + alphabet[:7])
            errors.append(float(np.square(model.logits(ids) - exact.logits(ids)).mean()))
    assert errors[1] < 0.8 * errors[0]


def test_calibration_on_the_command_line(cli: Callable[..., Any], tiny_folder: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "t.jsonl", ["ab cd ef gh ij kl mn op qr st uv wx yz"] * 3)
    out = tmp_path / "out.ert"
    assert cli("convert", tiny_folder, "-o", out, "--calibrate", text).status == 0
    shown = cli("inspect", out).out
    assert "calibration" in shown
    assert '"text": "t.jsonl"' in shown
    halves = f"{tmp_path}/a.ert,{tmp_path}/b.ert"
    refused = cli("convert", tiny_folder, "-o", halves, "--split", 1, "--calibrate", text)
    assert refused.status == 2
    assert "calibrate one .ert file and split that" in refused.err


@pytest.mark.compiled
def test_every_matrix_of_every_architecture_is_seen(tmp_path: Path) -> None:
    for name in tiny_models.CONFIGS:
        tiny_models.write_folder(tmp_path / name, name)
        edgert.convert(tmp_path / name, tmp_path / "m.ert", "f32", sparsity="none")
        with ErtFile.open(tmp_path / "m.ert") as file:
            weights = Weights.of_file(file)
            forward = Forward(weights, EngineConfig(threads=1, context=16, chunk=8))
            try:
                seen = {matrix for tap in find_taps(forward, weights) for matrix in tap.names}
            finally:
                forward.close()
            spec, wanted = file.spec, set()
            for tensor in file.tensors.values():
                if tensor.name.startswith("layers."):
                    # Gate and up of experts meet what their router meets.
                    parts = {part for part, _, _ in matrices_in(tensor)}
                    wanted |= {p for p in parts if tensor.role != "expert" or p.endswith(".down")}
            wanted.add("token_embedding" if spec.tied_embeddings else "output")
            assert wanted <= seen, name


def test_every_matrix_of_latent_attention_is_seen_those_of_heads_once_for_each() -> None:
    weights, seen, _ = walked(LATENT)
    tokens, spec = sum(map(len, WINDOWS)), LATENT
    for name, tensor in weights.tensors.items():
        if tensor.role == "matrix" and name.startswith("layers."):
            times = spec.heads if name.endswith(("k_up", "v_up")) else 1
            assert seen[name].shape == (times * tokens, tensor.shape[1]), name
    # What the last matrix of attention meets is what those of the heads give, from what they meet.
    made = matrix(weights, "layers.0.v_up").reshape(spec.heads, spec.value_dim, -1)
    at = 0
    for window in (len(part) for whole in WINDOWS for part in chunks(whole)):
        met = seen["layers.0.v_up"][at * spec.heads : (at + window) * spec.heads]
        heads = np.einsum("hvr,htr->thv", made, met.reshape(spec.heads, window, -1))
        np.testing.assert_allclose(
            seen["layers.0.o"][at : at + window], heads.reshape(window, -1), rtol=0, atol=1e-5
        )
        at += window


def chunks(tokens: Sequence[int]) -> list[Sequence[int]]:
    return [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
