"""Models for pictures and text whose language model is one of ours: it is converted, alone.

Their config.json holds the language model's under `text_config`, their checkpoint its tensors behind a
prefix, beside those of an encoder of pictures. A text without pictures gives the same logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from edgert.converters.architectures.family import Variant
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A model_type around one of ours."""

    inner: str  # the model_type of the language model
    class_name: str
    defaults: Mapping[str, Any]  # of keys that text_config leaves out


WRAPPED: Final = {
    "gemma3": Wrapped(
        "gemma3_text",
        "Gemma3ForConditionalGeneration",
        {
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
        },
    ),
    "mistral3": Wrapped("mistral", "Mistral3ForConditionalGeneration", {}),
}
PREFIXES: Final = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
"""What the tensors of the language model are called there, before and since transformers 5."""
PICTURES: Final = (
    *("vision_tower.", "multi_modal_projector."),
    *("model.vision_tower.", "model.multi_modal_projector."),
)
"""What opens the names of the rest."""


def unwrapped(config: HfConfig) -> HfConfig:
    """The config of the language model in one of WRAPPED, in the form of a file of its own."""
    known, inner = WRAPPED[config.text("model_type")], config.child("text_config")
    found = inner.text("model_type", known.inner)
    if found != known.inner:
        raise UnsupportedError(
            f"{inner.where}: found model_type {shown(found)}, expected {known.inner}; convert another model"
        )
    outer = ("architectures", "bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    values = {key: config.values[key] for key in outer if config.has(key)}
    whole = inner.renamed({}, {**known.defaults, "model_type": found})
    return HfConfig({**whole.values, **values}, inner.where)


def of_wrapped(variant: Callable[[HfConfig], Variant], config: HfConfig, model_type: str) -> Variant:
    """The variant of an unwrapped config, for the checkpoint it came from."""
    plain = variant(config)
    layout = replace(plain.layout, prefixes=PREFIXES, foreign=PICTURES)
    return replace(plain, layout=layout, class_name=WRAPPED[model_type].class_name)
