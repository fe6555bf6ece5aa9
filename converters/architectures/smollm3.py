"""SmolLM3 (transformers' modeling_smollm3.py): layers without rotary embedding, by default every fourth."""

from edgert.config import GLOBAL_ROPE, NO_ROPE
from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_count, typed_windows, window_size
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import ConversionError


def variant(config: HfConfig) -> Variant:
    """What a smollm3 config says beyond the fields of the family."""
    layers, bias = layer_count(config), config.flag("attention_bias")
    interval = config.integer("no_rope_layer_interval", 4)
    rotated = config.ids("no_rope_layers") or [int(i % interval != 0) for i in range(1, layers + 1)]
    if len(rotated) != layers or not set(rotated) <= {0, 1}:
        raise ConversionError(
            f"{config.where}: found no_rope_layers {shown(rotated)}, expected 0 or 1 for each of {layers} "
            "layers; download the model's files again"
        )
    size = window_size(config) if config.flag("use_sliding_window") else 0
    kinds = config.texts("layer_types") or [
        "full_attention" if rope or not size else "sliding_attention" for rope in rotated
    ]
    ropes = tuple(GLOBAL_ROPE if rope else NO_ROPE for rope in rotated)
    return Variant(
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=config.flag("mlp_bias"),
        windows=typed_windows(config, kinds, size),
        fields={"ropes": () if all(rotated) else ropes},
        defaults={"tie_word_embeddings": True, "rope_theta": 2000000.0},
        # pretraining_tp: published files say 2, and nothing is computed of it.
        understood=frozenset(("no_rope_layers", "pretraining_tp")),
    )
