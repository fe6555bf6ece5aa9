"""Rotary frequencies: literals computed with transformers' ROPE_INIT_FUNCTIONS, and refusals."""

import math
from typing import Any

import numpy as np
import pytest

from edgert.converters.hf_config import HfConfig
from edgert.converters.rope import Rope, make_rope
from edgert.errors import ConversionError, UnsupportedError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def rope(parameters: dict[str, Any], head_dim: int = 16, positions: int = 32768) -> Rope:
    return make_rope(HfConfig(parameters, "config.json"), head_dim, positions)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (PLAIN, [1.0, 0.31622776, 0.1, 0.03162278, 0.01, 0.0031622779, 0.001, 0.0003162278]),
        (
            PLAIN | {"rope_type": "linear", "factor": 3.0},
            [
                0.33333334,
                0.10540926,
                0.033333335,
                0.010540926,
                0.0033333332,
                0.0010540927,
                0.00033333336,
                0.000105409265,
            ],
        ),
        (
            LLAMA3 | {"factor": 8.0},
            [
                1.0,
                0.19392276,
                0.03760603,
                0.007292665,
                0.000524846,
                3.4281024e-05,
                6.6478697e-06,
                1.2891732e-06,
            ],
        ),
        (
            LLAMA3 | {"factor": 32.0},
            [
                1.0,
                0.19392276,
                0.03760603,
                0.007292665,
                0.0004295567,
                8.570256e-06,
                1.6619674e-06,
                3.222933e-07,
            ],
        ),
        (YARN, [1.0, 0.17782794, 0.03162278, 0.00421756, 0.0005, 4.4456985e-05, 7.905694e-06, 1.4058534e-06]),
        (
            YARN | {"original_max_position_embeddings": 8192, "truncate": False},
            [
                1.0,
                0.17782794,
                0.03162278,
                0.0038302466,
                0.000307408,
                4.4456985e-05,
                7.905694e-06,
                1.4058534e-06,
            ],
        ),
    ],
    ids=["default", "linear", "llama 3.1", "llama 3.2", "yarn", "yarn untruncated"],
)
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], expected: list[float]) -> None:
    found = rope(parameters).frequencies
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(expected, np.float32), rtol=3e-7)


@pytest.mark.parametrize(
    ("extra", "magnitude"),
    [
        ({}, 1.138629436111989),
        ({"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8}, 1.0569662567531275),
        ({"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0}, 1.3688879454113936),
        ({"attention_factor": 1.5}, 1.5),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_the_magnitude_of_yarn_is_that_of_transformers(extra: dict[str, Any], magnitude: float) -> None:
    assert rope(YARN | extra).magnitude == pytest.approx(magnitude, rel=1e-15)


def test_only_yarn_has_a_magnitude() -> None:
    assert {rope(p).magnitude for p in (PLAIN, LLAMA3 | {"factor": 8.0})} == {1.0}


def test_dynamic_scaling_changes_nothing_within_the_models_context() -> None:
    dynamic = rope({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0})
    np.testing.assert_array_equal(dynamic.frequencies, rope(PLAIN).frequencies)
    assert dynamic.context == 32768


def test_yarn_stretches_the_context_by_its_factor() -> None:
    """Model cards add the rule to config.json and leave max_position_embeddings as it was."""
    assert rope(YARN | {"original_max_position_embeddings": 32768}).context == 131072
    assert rope(YARN | {"original_max_position_embeddings": 8192}).context == 32768


LONG = {"long_factor": [4.0] * 8, "original_max_position_embeddings": 4096, "short_factor": [2.0] * 8}


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_is_that_of_its_first_context(kind: str) -> None:
    plain, long = rope({}), rope(LONG | {"rope_type": kind})
    np.testing.assert_allclose(long.frequencies, plain.frequencies / 2, rtol=1e-6)
    assert long.context == 4096
    assert long.magnitude == pytest.approx(math.sqrt(1 + math.log(8) / math.log(4096)))
    for wrong in (None, [1.0], [0.0] * 8, ["1"] * 8):
        with pytest.raises(ConversionError, match="found short_factor"):
            rope(LONG | {"rope_type": kind, "short_factor": wrong})


@pytest.mark.parametrize("kind", ["mrope", "proportional"])
def test_an_unknown_rule_is_refused_with_those_supported(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"found rope_type '{kind}', expected one of default, .*yarn"):
        rope({"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "linear"}, "found no factor"),
        ({"rope_type": "linear", "factor": "4"}, "found factor '4', expected a number > 0"),
        ({"rope_type": "linear", "factor": float("inf")}, "found factor inf"),
        ({"rope_type": "linear", "factor": True}, "found factor True"),
        ({"rope_theta": 1.0}, "found rope_theta 1.0, expected a number > 1"),
        ({"rope_type": 3}, "found rope_type 3, expected a string"),
        (LLAMA3 | {"factor": 8.0, "high_freq_factor": 1.0}, "expected the first below the second"),
        (YARN | {"truncate": "yes"}, "found truncate 'yes'"),
    ],
)
def test_impossible_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        rope(parameters)
    assert "\n" not in str(caught.value)


def test_parts_of_a_head_turned_by_other_positions_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not compute"):
        rope(PLAIN | {"mrope_section": [16, 24, 24]})


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        PLAIN,
        PLAIN | {"rope_type": "linear", "factor": 3.0},
        PLAIN | {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3 | {"factor": 32.0},
        YARN | {"original_max_position_embeddings": 8192},
        YARN | {"original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    ],
    ids=lambda p: p["rope_type"],
)
def test_frequencies_agree_with_the_installed_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=32768,
        rope_parameters=dict(parameters),
    )
    oracle = LlamaRotaryEmbedding(config)
    found = rope(parameters, head_dim)
    np.testing.assert_allclose(found.frequencies, oracle.inv_freq.numpy(), rtol=3e-7)
    assert found.magnitude == oracle.attention_scaling
