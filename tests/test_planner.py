"""From a model and a budget to a configuration, with numbers in every refusal."""

from dataclasses import replace
from typing import Any

import pytest

from edgert.config import EngineConfig, ModelSpec
from edgert.errors import MemoryBudgetError, OptionError
from edgert.kv_cache import KvCache
from edgert.model.shapes import SHAPES, random_weights
from edgert.planner import (
    BASE_BYTES,
    DEFAULT_CHUNK,
    DEFAULT_CONTEXT,
    buffer_bytes,
    cache_bytes,
    cores,
    parse_size,
    plan,
)

SMALL = ModelSpec("llama", 2, 64, 4, 2, 16, 96, 128, 256, 1e-5, tied_embeddings=True)
LARGE = SHAPES["llama-3.2-1b"]
LARGE_BYTES = 700 << 20
MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("1k", 1000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512M", 512 * 10**6),
        ("512MiB", 512 * MIB),
        ("1.5GiB", 1536 * MIB),
        (" 2 g ", 2 * 10**9),
        ("2gi", 2 << 30),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "12x", "GiB", "-1", "1.G", "1,5G", "1T", "0x10", "1e9", "1 2", "½G"])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match=r"a size of .*; expected a number of bytes or one like 512MiB"):
        parse_size(text)


def test_defaults_are_all_cores_and_a_moderate_context() -> None:
    assert plan(LARGE, LARGE_BYTES) == EngineConfig(cores(), DEFAULT_CONTEXT, DEFAULT_CHUNK, "f16")
    assert plan(SMALL, 1000).context == SMALL.context  # never more than the model's own


def test_what_is_asked_for_is_what_comes() -> None:
    found = plan(LARGE, LARGE_BYTES, threads=3, context=32768, chunk=17, kv="q8")
    assert found == EngineConfig(3, 32768, 17, "q8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; expected 1 to 256"),
        ({"threads": 257}, "threads is 257; expected 1 to 256"),
        ({"threads": 1.5}, "threads is 1.5; expected 1 to 256"),
        ({"context": 257}, "context is 257; expected 1 to 256"),
        ({"context": -1}, "context is -1; expected 1 to 256"),
        ({"chunk": 4097}, "chunk is 4097; expected 1 to 4096"),
        ({"kv": "f32"}, "kv is 'f32'; expected one of f16, q8, q4"),
        ({"ram": 1.5}, "ram is 1.5; expected bytes as a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan(SMALL, 1000, **options)


def test_budget_counts_weights_cache_and_buffers() -> None:
    config = plan(LARGE, LARGE_BYTES, threads=2)
    need = BASE_BYTES + LARGE_BYTES + cache_bytes(LARGE, config) + buffer_bytes(LARGE, config)
    assert plan(LARGE, LARGE_BYTES, threads=2, ram=need) == config
    with pytest.raises(MemoryBudgetError) as error:
        plan(LARGE, LARGE_BYTES, threads=2, ram=need - 1)
    for part in ("weights 700 MiB", "cache of 8192 positions 256 MiB", "give at least"):
        assert part in str(error.value)


def test_following_the_advice_of_a_refusal_works() -> None:
    for context in (100, 1000, 8192):
        with pytest.raises(MemoryBudgetError) as error:
            plan(LARGE, LARGE_BYTES + 123456, context=context, ram="100MiB")
        advice = str(error.value).split("give at least ")[1].split(",")[0]
        assert plan(LARGE, LARGE_BYTES + 123456, context=context, ram=advice).context == context


def test_smaller_contexts_and_caches_need_less() -> None:
    config = plan(LARGE, LARGE_BYTES)
    assert cache_bytes(LARGE, config) == 8192 * 16 * 8 * 64 * 2 * 2  # positions, layers, heads, d, k+v, f16
    assert cache_bytes(LARGE, replace(config, kv="q8")) < 0.6 * cache_bytes(LARGE, config)
    assert cache_bytes(LARGE, replace(config, context=1024)) == cache_bytes(LARGE, config) / 8


@pytest.mark.parametrize(
    ("threads", "context", "chunk", "kv"), [(1, 64, 8, "f16"), (4, 256, 256, "q8"), (2, 9, 1, "f16")]
)
def test_prediction_covers_what_is_allocated(threads: int, context: int, chunk: int, kv: Any) -> None:
    from edgert.model.forward import Forward

    config = EngineConfig(threads, context, chunk, kv)
    forward = Forward(random_weights(SMALL, "q4"), config)
    assert KvCache(SMALL, config).data.nbytes == forward.cache.data.nbytes == cache_bytes(SMALL, config)
    # The rest are the words of rows and paths, which do not grow with the model.
    rest = forward.state.rows.nbytes + forward.state.paths.nbytes
    predicted = buffer_bytes(SMALL, config)
    forward.close()
    assert 0.7 * predicted < forward.state.nbytes - rest <= 1.35 * predicted
