"""Logits equal those of transformers to 1e-3, for every option that changes the arithmetic."""

import json
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

import edgert
from tests import tiny_models

GOLDENS = Path(__file__).parent / "goldens"
INDEX: dict[str, Any] = json.loads((GOLDENS / "index.json").read_text(encoding="utf-8"))
TOKENS: list[int] = INDEX["tokens"]
TOLERANCE = 1e-3

# Without the JIT a forward pass takes seconds: a few models that hold most options between them.
SLOW_NAMES = [
    "llama_rope_llama3",
    "qwen2_window_yarn_v4",
    "qwen3_gqa_tied_head_dim",
    "granitemoe_tied",
    "gemma2_caps",
    "gpt2_defaults",
    "falcon_alibi",
    "cohere_biases",
]
NAMES = SLOW_NAMES if numba.config.DISABLE_JIT else list(tiny_models.CONFIGS)
FRESH_SEEDS = [1, 2]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model_file(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(name, tiny_models.SEED, tmp_path_factory.mktemp(name))


def converted(name: str, seed: int, folder: Path) -> Path:
    """The model written as a Hugging Face folder and converted without loss."""
    source, target = folder / "source", folder / "model.ert"
    tiny_models.write_folder(source, name, seed)
    edgert.convert(source, target, quant="f32")
    return target


def logits(model_file: Path, tokens: list[int], chunk: int | None = None) -> NDArray[np.float32]:
    with edgert.load(model_file, threads=1, chunk=chunk) as model:
        return model.logits(tokens)


def test_every_model_has_goldens() -> None:
    stored = {path.stem for path in GOLDENS.glob("*.npy")}
    assert stored == set(tiny_models.CONFIGS) == set(INDEX["weights_sha256"])


def test_weights_are_those_behind_the_goldens(name: str) -> None:
    weights = tiny_models.weights(tiny_models.CONFIGS[name], INDEX["seed"])
    assert tiny_models.digest(weights) == INDEX["weights_sha256"][name]


def test_logits_match_the_goldens(name: str, model_file: Path) -> None:
    found = logits(model_file, TOKENS)
    assert found.dtype == np.float32
    assert found.shape == (len(TOKENS), tiny_models.CONFIGS[name]["vocab_size"])
    expected = np.load(GOLDENS / f"{name}.npy")
    np.testing.assert_allclose(found[INDEX["positions"]], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7])  # 7 divides neither the text nor a window
def test_logits_are_the_same_bits_in_chunks(model_file: Path, chunk: int) -> None:
    whole = logits(model_file, TOKENS, chunk=len(TOKENS))
    np.testing.assert_array_equal(logits(model_file, TOKENS, chunk=chunk), whole)


@pytest.mark.filterwarnings("default")  # torch and transformers deprecate things as they are imported
@pytest.mark.parametrize("seed", FRESH_SEEDS)
def test_logits_match_transformers_over_the_whole_context(name: str, seed: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    tokens = tiny_models.tokens(tiny_models.positions(tiny_models.CONFIGS[name]), seed)
    found = logits(converted(name, seed, tmp_path), tokens)
    expected = transformers_logits(tmp_path / "source", tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def transformers_logits(folder: Path, tokens: list[int]) -> NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    attention = tiny_models.attention_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, experts_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()
