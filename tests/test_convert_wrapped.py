"""Models for pictures and text: their language model is converted as if it were published alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgert
from edgert.converters.architectures import describe
from edgert.converters.hf_config import HfConfig
from edgert.errors import UnsupportedError
from edgert.format import ErtFile
from tests import tiny_models

PICTURES = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": np.ones((8, 3, 2, 2), np.float32),
    "multi_modal_projector.mm_input_projection_weight": np.ones((8, 64), np.float32),
}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_gemma_3_is_the_one_published_alone(prefix: str, tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["gemma3_local_global"]
    tensors = tiny_models.weights(config, tiny_models.SEED)
    tiny_models.write_model(tmp_path / "alone", config, tensors)
    outer = "" if prefix.startswith("language") else "model."
    renamed = {prefix + name.removeprefix("model."): values for name, values in tensors.items()}
    pictures = {outer + name: values for name, values in PICTURES.items()}
    tiny_models.write_model(tmp_path / "both", wrapped(config), renamed | pictures)
    for name in ("alone", "both"):
        edgert.convert(tmp_path / name, tmp_path / f"{name}.ert", quant="f32")
    with ErtFile.open(tmp_path / "alone.ert") as one, ErtFile.open(tmp_path / "both.ert") as other:
        assert one.spec == other.spec
        assert {t.name: t.sha256 for t in one.tensors.values()} == {
            t.name: t.sha256 for t in other.tensors.values()
        }


def wrapped(config: dict[str, Any]) -> dict[str, Any]:
    outer = {key: config[key] for key in ("bos_token_id", "eos_token_id", "dtype")}
    inner = {key: value for key, value in config.items() if key not in (*outer, "architectures")}
    return outer | {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": inner,
        "vision_config": {"model_type": "siglip_vision_model"},
    }


def test_what_the_published_4b_leaves_out_is_known() -> None:
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    decoder = describe(HfConfig(config, "config.json"), HfConfig({}, "generation_config.json"))
    spec = decoder.spec
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab) == (8, 4, 256, 262208)
    assert (spec.context, spec.rope_theta, spec.rope_scaling) == (131072, 1000000.0, "linear")
    assert (spec.eos_ids, spec.tied_embeddings) == ((1, 106), True)
    assert decoder.computed["rope_frequencies"][0] == np.float32(1 / 8)
    assert decoder.computed["local_rope_frequencies"][0] == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"text_config": {"model_type": "gemma3n_text"}},
            "'gemma3n_text', expected gemma3_text",
        ),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "expected Gemma3ForConditionalGeneration"),
        ({"quantization_config": {"quant_method": "fp8"}}, "found quantization_config"),
    ],
)
def test_other_models_inside_are_refused(changed: dict[str, Any], message: str) -> None:
    config = wrapped(tiny_models.CONFIGS["gemma3_local_global"]) | changed
    with pytest.raises(UnsupportedError, match=message):
        describe(HfConfig(config, "config.json"), HfConfig({}, "generation_config.json"))
