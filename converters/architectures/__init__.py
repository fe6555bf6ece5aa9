"""The architectures edgert converts, by Hugging Face model_type.

A new one is a file with a `variant` function, and a line here.
"""

from collections.abc import Callable
from typing import Final

from edgert.converters.architectures import (
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3_text,
    glm4,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    llama,
    ministral,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
    starcoder2,
)
from edgert.converters.architectures.family import Decoder, Variant, read_decoder
from edgert.converters.architectures.names import source_name
from edgert.converters.architectures.wrapped import WRAPPED, of_wrapped, unwrapped
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import NotAModelError, UnsupportedError

VARIANTS: Final[dict[str, Callable[[HfConfig], Variant]]] = {
    "llama": llama.variant,
    "mistral": mistral.variant,
    "ministral": ministral.variant,
    "qwen2": qwen2.variant,
    "qwen3": qwen3.variant,
    "gemma": gemma.variant,
    "gemma2": gemma2.variant,
    "gemma3_text": gemma3_text.variant,
    "phi3": phi3.variant,
    "smollm3": smollm3.variant,
    "granite": granite.variant,
    "olmo2": olmo2.variant,
    "olmo3": olmo3.variant,
    "glm4": glm4.variant,
    "exaone4": exaone4.variant,
    "starcoder2": starcoder2.variant,
    "stablelm": stablelm.variant,
    "cohere": cohere.variant,
    "cohere2": cohere2.variant,
    "gpt2": gpt2.variant,
    "gpt_neox": gpt_neox.variant,
    "opt": opt.variant,
    "falcon": falcon.variant,
    "mixtral": mixtral.variant,
    "olmoe": olmoe.variant,
    "qwen2_moe": qwen2_moe.variant,
    "qwen3_moe": qwen3_moe.variant,
    "granitemoe": granitemoe.variant,
    "gpt_oss": gpt_oss.variant,
    "deepseek_v2": deepseek_v2.variant,
    "deepseek_v3": deepseek_v3.variant,
}

__all__ = ["VARIANTS", "Decoder", "describe", "source_name"]


def describe(config: HfConfig, generation: HfConfig) -> Decoder:
    """The decoder that config.json and generation_config.json (empty if absent) describe.

    Raises NotAModelError for a config without a model_type, UnsupportedError naming what was
    found and what is supported, ConversionError for a config that is damaged.
    """
    if not config.has("model_type"):
        raise NotAModelError(
            f"{config.where}: found no model_type, expected the config.json of a language model; "
            "check that this is the model's folder"
        )
    model_type = config.text("model_type")
    if model_type in WRAPPED:
        inner = unwrapped(config)
        variant = of_wrapped(VARIANTS[inner.text("model_type")], inner, model_type)
        return read_decoder(inner, generation, variant)
    if model_type not in VARIANTS:
        known = ", ".join((*VARIANTS, *WRAPPED))
        raise UnsupportedError(
            f"{config.where}: found model_type {shown(model_type)}, expected one of {known}; "
            "convert a model of a supported architecture"
        )
    return read_decoder(config, generation, VARIANTS[model_type](config))
