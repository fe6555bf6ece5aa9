"""Command R7B and Command A (transformers' modeling_cohere2.py): Cohere's block, rope only in windows."""

from dataclasses import replace

from edgert.config import GLOBAL_ROPE, NO_ROPE
from edgert.converters.architectures import cohere
from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_kinds, typed_windows, window_size
from edgert.converters.hf_config import HfConfig


def variant(config: HfConfig) -> Variant:
    """What a cohere2 config says beyond the fields of the family."""
    plain, size = cohere.parallel(config), window_size(config)
    kinds = layer_kinds(config, config.integer("sliding_window_pattern", 4))
    ropes = tuple(GLOBAL_ROPE if size and kind == "sliding_attention" else NO_ROPE for kind in kinds)
    return replace(
        plain,
        windows=typed_windows(config, kinds, size),
        fields={**plain.fields, "ropes": ropes if NO_ROPE in ropes else ()},
        defaults={**plain.defaults, "rope_theta": 10000.0},
    )
