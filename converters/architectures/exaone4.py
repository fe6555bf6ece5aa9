"""EXAONE 4 (transformers' modeling_exaone4.py): OLMo 2's norms; only layers with a window have rope."""

from edgert.config import GLOBAL_ROPE, NO_ROPE
from edgert.converters.architectures import olmo2
from edgert.converters.architectures.cuts import Layout
from edgert.converters.architectures.family import Variant
from edgert.converters.architectures.windows import layer_count, layer_kinds, typed_windows, window_size
from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import UnsupportedError


def variant(config: HfConfig) -> Variant:
    """What an exaone4 config says beyond the fields of the family."""
    size = window_size(config)
    kinds: list[str] = ["full_attention"] * layer_count(config)
    ropes: tuple[int, ...] = ()
    if size:
        kinds = _kinds(config)
        ropes = tuple(GLOBAL_ROPE if kind == "sliding_attention" else NO_ROPE for kind in kinds)
    return Variant(
        qk_norm=True,
        windows=typed_windows(config, kinds, size),
        fields={"block": "post", "ropes": ropes if NO_ROPE in ropes else ()},
        layout=Layout(names=olmo2.NAMES),
    )


def _kinds(config: HfConfig) -> list[str]:
    """`sliding_window_pattern` is a number or, beside layer_types, letters."""
    kinds, pattern = config.texts("layer_types"), config.values.get("sliding_window_pattern", 4)
    if not kinds and not (type(pattern) is int and pattern > 0):
        raise UnsupportedError(
            f"{config.where}: found sliding_window_pattern {shown(pattern)} without layer_types, expected a "
            "number; convert a version of the model with layer_types"
        )
    return kinds or layer_kinds(config, pattern)
