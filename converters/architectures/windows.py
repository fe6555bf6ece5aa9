"""Which layers of a config.json have a sliding window, which a rotary embedding, which experts."""

from typing import Final

from edgert.converters.hf_config import HfConfig, shown
from edgert.errors import UnsupportedError

# The deepest models published have fewer than 200.
MAX_LAYERS: Final = 1 << 14


def layer_count(config: HfConfig) -> int:
    """`num_hidden_layers`, bounded before anything is made for each of them."""
    return config.integer("num_hidden_layers", most=MAX_LAYERS)


def window_size(config: HfConfig) -> int:
    """`sliding_window` where it is used: W lets position p see keys p - W + 1 to p; 4096 if absent.

    transformers' `sliding_window_overlay` allows keys > p - W, so W counts the token itself as
    ModelSpec.windows does. A null is no window, 0.
    """
    if "sliding_window" in config.values and not config.has("sliding_window"):
        return 0
    return config.integer("sliding_window", 4096)


def refuse_windows(config: HfConfig) -> None:
    """UnsupportedError for what would give layers windows, of architectures that have none."""
    config.refuse_unless("sliding_window")
    config.refuse_unless("layer_types")


def layer_windows(config: HfConfig) -> tuple[int, ...]:
    """The windows of Qwen: per layer as `layer_types` says, or from `max_window_layers` up."""
    layers = layer_count(config)
    size = window_size(config) if config.flag("use_sliding_window") else 0
    kinds = config.texts("layer_types")
    if not kinds:
        first = config.integer("max_window_layers", 28, least=0)
        kinds = ["sliding_attention" if size and i >= first else "full_attention" for i in range(layers)]
    return typed_windows(config, kinds, size)


def typed_windows(config: HfConfig, kinds: list[str], size: int) -> tuple[int, ...]:
    """The window of each layer by its type: `size` for sliding_attention."""
    layers = layer_count(config)
    known = {"full_attention": 0, "sliding_attention": size}
    if len(kinds) != layers or not set(kinds) <= set(known) or (not size and "sliding_attention" in kinds):
        raise UnsupportedError(
            f"{config.where}: found layer_types {shown(sorted(set(kinds)))} for {len(kinds)} layers with "
            f"sliding_window {size}, expected {layers} of full_attention or sliding_attention; "
            "convert another version of the model"
        )
    return tuple(known[kind] for kind in kinds)


def layer_kinds(config: HfConfig, pattern: int) -> list[str]:
    """`layer_types`, or what stands for it where it is absent: every `pattern`-th layer sees all keys."""
    layers = range(1, layer_count(config) + 1)
    return config.texts("layer_types") or [
        "sliding_attention" if i % pattern else "full_attention" for i in layers
    ]


def every_layer(config: HfConfig) -> tuple[int, ...]:
    """One window for all layers, as `sliding_window` says; none where it is absent or null."""
    size = config.integer("sliding_window") if config.has("sliding_window") else 0
    return (size,) * layer_count(config)


def binding(windows: tuple[int, ...], context: int) -> tuple[int, ...]:
    """Windows without those as long as the context, which hide nothing."""
    kept = tuple(window if window < context else 0 for window in windows)
    return kept if any(kept) else ()


def dense_layers(config: HfConfig) -> tuple[int, ...]:
    """The dense layers of Qwen's models with experts: all that no `decoder_sparse_step` ends, and those
    of `mlp_only_layers`."""
    layers, step = layer_count(config), config.integer("decoder_sparse_step", 1)
    named = config.ids("mlp_only_layers")
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)
