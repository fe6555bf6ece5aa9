"""From a model, a machine and a budget to an EngineConfig."""

import os
import re
from dataclasses import replace
from pathlib import Path

from edgert import tiling
from edgert.config import KV_TYPES, EngineConfig, KvType, ModelSpec, Tiling
from edgert.errors import MemoryBudgetError, OptionError
from edgert.flash import Parts
from edgert.kernels import execute
from edgert.kernels import kv as kv_kernels
from edgert.kernels.attention import MOST_HEADS
from edgert.state import MAX_OUTPUTS

DEFAULT_CONTEXT = 8192
"""Positions of the cache when none are asked for: a long conversation, at 256 MiB for a 1B model."""
DEFAULT_CHUNK = 256
"""Prompt tokens per forward. More reuse of each weight than 64 rows gains little; buffers grow with it."""
BYTES_PER_THREAD = 8 << 20
"""Weights that are worth one more thread: with 4 MiB a second one gains nothing over the barriers it
costs (measured 137 and 134 us a token), with 16 MiB a third of the time."""
BASE_BYTES = 200 << 20
"""Resident memory of Python with numpy, numba and the compiled kernels: 150-180 MB measured."""
COMPILING_BYTES = 180 << 20
"""What compiling adds where the kernels are not in the cache: 361 MB in all measured."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of "1GiB", "512M", "1.5g" or a plain number; raises OptionError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if match is None:
        raise OptionError(f"a size of {text!r}; expected a number of bytes or one like 512MiB, 2GiB, 1.5G")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def require_memory(count: int, what: str) -> None:
    """Raise MemoryBudgetError where the machine has fewer bytes left than `what` takes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(text.split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return  # no way to know
    if count > free:
        raise MemoryBudgetError(
            f"{what} takes {_mib(count)}, but {_mib(free)} of memory are available; choose a smaller one"
        )


def buffer_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Memory of the run's buffers: some float rows per token of a chunk, and the logits."""
    inner = (spec.ffn_width if spec.has_dense_layers else 0) + spec.shared_width
    width = (2 if spec.block == "pre" else 3) * spec.width
    mixed = spec.heads * spec.value_width
    row = width + (spec.heads + 2 * spec.kv_heads) * spec.head_dim + mixed + 2 * inner
    if spec.latent:  # rows before and behind attention, by head, and the latents before their norms
        by_head = spec.heads * (spec.plain_dim + spec.value_dim) + spec.query_latent
        row, mixed = row + by_head + spec.latent, mixed + by_head
    row += len(spec.ropes_used) * spec.rotated
    row += spec.active_experts * (spec.width + 2 * spec.expert_width + 8) + 2 * spec.experts
    row += spec.width if spec.shared_width else 0
    rank = max(spec.predictors, default=0)
    row += rank + (spec.ffn_width if rank or spec.core else 0)
    quantized = width - spec.width + mixed + inner
    quantized += spec.active_experts * (spec.width + spec.expert_width) + rank
    logits = MAX_OUTPUTS * (spec.vocab + (2 if spec.held_exits else 1) * spec.width)
    scratch = config.threads * MOST_HEADS * (config.context + spec.head_dim + 48)
    cores = config.sequences * spec.layers * spec.ffn_width if spec.core else 0
    # Of a core its scores, its counts, and the newest token's: 9 bytes (model/cores.py).
    return 4 * (config.chunk * row + logits + scratch) + config.chunk * quantized * 5 // 4 + 9 * cores


def cache_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Memory of a full KV cache, of all its sequences."""
    capacity = -(-config.context // 16) * 16
    region = kv_kernels.region_bytes(KV_TYPES.index(config.kv), capacity, spec.head_dim, spec.value_width)
    return config.sequences * region * (spec.last_layer - spec.first_layer) * spec.kv_heads


def run_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Memory of a run beside the weights: its cache and its buffers."""
    return cache_bytes(spec, config) + buffer_bytes(spec, config)


def plan(
    spec: ModelSpec,
    weight_bytes: int,
    *,
    threads: int | None = None,
    ram: int | str | None = None,
    context: int | None = None,
    kv: KvType = "f16",
    chunk: int | None = None,
    sequences: int = 1,
    draft_bytes: int = 0,
    streamed: Parts | None = None,
) -> EngineConfig:
    """The configuration to run a model with; raises MemoryBudgetError when it cannot fit in `ram`.

    draft_bytes: what a draft model takes beside it. streamed: what of weight_bytes can be read when it is
    needed; as much as fits is held in memory where all of it does not.
    """
    if kv not in KV_TYPES:
        raise OptionError(f"kv is {kv!r}; expected one of {', '.join(KV_TYPES)}")
    config = EngineConfig(
        threads=_positive("threads", threads, min(cores(), 1 + weight_bytes // BYTES_PER_THREAD), 256),
        context=_positive("context", context, min(spec.context, DEFAULT_CONTEXT), spec.context),
        chunk=_positive("chunk", chunk, DEFAULT_CHUNK, 4096),
        kv=kv,
        sequences=sequences,
        tiling=tiling.kept() or Tiling(),
    )
    budget = parse_size(ram) if isinstance(ram, str) else ram
    if not isinstance(budget, int | None):
        raise OptionError(f"ram is {budget!r}; expected bytes as a whole number, or a text like 2GiB")
    if budget is not None:
        compiling = 0 if execute.is_cached(spec.experts > 0, spec.neurons) else COMPILING_BYTES
        cache, buffers = cache_bytes(spec, config), buffer_bytes(spec, config)
        fixed = BASE_BYTES + compiling + cache + buffers + draft_bytes
        whole = fixed + weight_bytes
        rest = whole - streamed.nbytes if streamed else whole  # without what can be streamed
        slots = streamed.slots(budget - rest) if streamed else 0
        if whole > budget and (streamed is None or slots < streamed.fewest):
            least = min(whole, rest + streamed.least) if streamed else whole
            draft = f", the draft {_mib(draft_bytes)}" if draft_bytes else ""
            less = " (after `edgert warmup` less)" if compiling else ""
            held = f"weights {_mib(weight_bytes)}"
            if streamed and least < whole:
                held = (
                    f"weights without {streamed.name} {_mib(weight_bytes - streamed.nbytes)}, room for "
                    f"{streamed.fewest} of {streamed.count} {streamed.name} {_mib(streamed.least)}"
                )
            raise MemoryBudgetError(
                f"ram is {_mib(budget)}, but this needs {_mib(least)}: {held}, a cache "
                f"of {config.context} positions {_mib(cache)}, buffers {_mib(buffers)}{draft}, Python and "
                f"kernels {_mib(BASE_BYTES + compiling)}{less}; give at least {_mib(least)}, or a smaller "
                "context"
            )
        if whole > budget:
            config = replace(config, slots=slots)
    return config


def _positive(name: str, value: int | None, default: int, most: int) -> int:
    if value is None:
        return min(default, most)
    if not isinstance(value, int) or not 0 < value <= most:
        raise OptionError(f"{name} is {value!r}; expected 1 to {most}")
    return value


def _mib(count: int) -> str:
    """Rounded up: who gives as much memory as a message asks for must have enough."""
    return f"{-(-count // (1 << 20))} MiB"
