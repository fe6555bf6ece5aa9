"""Configurations as they are published: each is read, and means what the model was trained with."""

import math

import pytest

from edgert.config import GLOBAL_ROPE, LOCAL_ROPE, NO_ROPE, ModelSpec
from edgert.converters.architectures import Decoder, describe
from edgert.converters.fp8 import without_blocks
from edgert.converters.hf_config import HfConfig
from tests.published_configs import PUBLISHED


def read(name: str) -> Decoder:
    config, _ = without_blocks(HfConfig(PUBLISHED[name], "config.json"))
    return describe(config, HfConfig({}, "generation_config.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read(name: str) -> None:
    values = PUBLISHED[name]
    spec = read(name).spec
    assert spec.architecture == values["model_type"]
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_8_bit_floats_in_blocks_are_understood_and_nothing_else_is_taken_for_them() -> None:
    blocks = {name: without_blocks(HfConfig(PUBLISHED[name], "config.json"))[1] for name in PUBLISHED}
    assert {name: block for name, block in blocks.items() if block} == {"deepseek-v3": (128, 128)}


def test_what_they_say_of_norms_and_heads() -> None:
    blocks = {name: read(name).spec.block for name in PUBLISHED}
    assert {name for name, block in blocks.items() if block == "parallel"} == {
        *("pythia-160m", "falcon-7b", "command-r"),
    }
    assert {name for name, block in blocks.items() if block == "around"} == {
        *("gemma-2-2b", "gemma-3-1b-it", "glm-4-9b-0414"),
    }
    falcon, neox, gpt2 = (read(name).spec for name in ("falcon-7b", "pythia-160m", "gpt2"))
    assert (falcon.kv_heads, falcon.shared_norm, falcon.ffn_width) == (1, True, 4 * 4544)
    assert (neox.rotary, neox.shared_norm, neox.activation) == (16, False, "gelu")
    assert (gpt2.ffn_width, gpt2.context, gpt2.learned_positions) == (3072, 1024, True)
    assert gpt2.tied_embeddings


def test_what_they_say_of_positions() -> None:
    gemma, smollm, exaone = (read(name).spec for name in ("gemma-3-1b-it", "smollm3-3b", "exaone-4.0-32b"))
    assert gemma.ropes == ((LOCAL_ROPE,) * 5 + (GLOBAL_ROPE,)) * 4 + (LOCAL_ROPE,) * 2
    assert gemma.windows == ((512,) * 5 + (0,)) * 4 + (512,) * 2
    assert smollm.ropes == (GLOBAL_ROPE, GLOBAL_ROPE, GLOBAL_ROPE, NO_ROPE) * 9
    assert exaone.ropes == (GLOBAL_ROPE, GLOBAL_ROPE, GLOBAL_ROPE, NO_ROPE) * 16
    assert exaone.windows == (4096, 4096, 4096, 0) * 16
    phi3, phi4, falcon = (read(name).spec for name in ("phi-3-mini-4k", "phi-4-mini", "falcon-rw-1b"))
    assert (phi3.windows, phi3.context) == ((2047,) * 32, 4096)
    assert (phi4.rotary, phi4.context, phi4.windows) == (96, 4096, ())
    assert (falcon.alibi, set(falcon.ropes), falcon.windows) == (True, {NO_ROPE}, ())


def test_what_is_multiplied_into_weights() -> None:
    granite, gemma = read("granite-3.1-2b"), read("gemma-2b")
    assert granite.factor("token_embedding") == 12.0
    assert granite.factor("layers.3.q") == pytest.approx(0.015625 * 64**0.5)
    assert granite.factor("output_norm") == pytest.approx(1 / 8 / 12)  # the embedding is the output too
    assert granite.factor("layers.3.down") == granite.factor("layers.3.o") == 0.22
    assert gemma.factor("token_embedding") == pytest.approx(2048**0.5)
    assert [gemma.offset(name) for name in ("output_norm", "layers.0.ffn_norm", "layers.0.q")] == [1, 1, 0]
    assert gemma.spec.activation == "gelu_tanh"
    assert read("command-r").factor("output_norm") == 0.0625


def test_what_they_say_of_latents_and_experts() -> None:
    oss, lite, moon, v3 = (
        read(name).spec for name in ("gpt-oss-20b", "deepseek-v2-lite", "moonlight-16b-a3b", "deepseek-v3")
    )
    assert (oss.windows, oss.context, oss.sinks, oss.swiglu_alpha) == ((128, 0) * 12, 131072, True, 1.702)
    assert oss.rope_magnitude == pytest.approx(0.1 * math.log(32) + 1)
    assert (lite.head_dim, lite.value_width, lite.kv_heads, lite.query_latent) == (576, 512, 1, 0)
    assert (lite.shared_width, lite.open_shared, lite.dense_layers) == (2816, True, (0,))
    assert (lite.routing_groups, lite.sigmoid_routing, lite.normalized_routing) == (0, False, False)
    assert (lite.context, lite.rope_magnitude) == (163840, 1.0)
    assert (moon.sigmoid_routing, moon.routing_groups, moon.active_groups) == (True, 1, 1)
    assert (v3.query_latent, v3.routing_groups, v3.active_groups, v3.dense_layers) == (1536, 8, 4, (0, 1, 2))
    # A score of a head of 192 is divided by its root, and YaRN's scale of 40 squared multiplies it.
    yarn = 0.1 * 0.707 * math.log(40) + 1
    assert read("deepseek-v2-lite").factor("layers.4.q_rope") == pytest.approx((576 / 192) ** 0.5 * yarn**2)
    assert read("moonlight-16b-a3b").factor("layers.4.q_plain") == pytest.approx(3**0.5)
    assert read("moonlight-16b-a3b").factor("layers.4.experts.7.down") == 2.446
    assert read("deepseek-v3").variant.layout.foreign == ("model.layers.61.",)
