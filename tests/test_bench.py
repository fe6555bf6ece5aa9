"""What a benchmark computes: the right number of passes, at the right place in the context."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

from edgert.bench import run_tests, token_time
from edgert.config import EngineConfig, ModelSpec
from edgert.engine import Engine
from edgert.errors import OptionError
from edgert.format import ErtFile
from edgert.model.shapes import SHAPES, parameters, random_weights, shape

SPEC = ModelSpec("llama", 1, 32, 1, 1, 32, 32, 48, 64, 1e-5, tied_embeddings=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(random_weights(SPEC, "q4"), EngineConfig(threads=1, context=48, chunk=16))
    yield made
    made.close()


@pytest.fixture
def passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(positions before, rows) of every forward pass."""
    seen: list[tuple[int, int]] = []
    run = engine.forward.run

    def counted(tokens: list[int], **options: Any) -> Any:
        seen.append((engine.forward.cache.length, len(tokens)))
        return run(tokens, **options)

    monkeypatch.setattr(engine.forward, "run", counted)
    return seen


def test_prompt_is_fed_in_chunks_and_text_token_by_token(
    engine: Engine, passes: list[tuple[int, int]]
) -> None:
    results = list(run_tests(engine, prompt=20, generate=3, repeats=2))
    assert [name for name, _, _ in results] == ["pp20", "tg3"]
    assert all(mean > 0 and deviation >= 0 for _, mean, deviation in results)
    warm_up, prompt, text = [(0, 8)], [(0, 16), (16, 4)], [(0, 1), (1, 1), (2, 1)]
    assert passes == warm_up + 2 * prompt + 3 * text  # the first three tokens are the warm-up


def test_depth_is_filled_first(engine: Engine, passes: list[tuple[int, int]]) -> None:
    results = list(run_tests(engine, prompt=5, generate=2, repeats=1, depth=20))
    assert [name for name, _, _ in results] == ["pp5@d20", "tg2@d20"]
    assert passes[:2] == [(0, 16), (16, 4)]
    assert passes[2:] == 2 * [(20, 5)] + 2 * [(20, 1), (21, 1)]


def test_tests_of_no_tokens_are_left_out(engine: Engine) -> None:
    assert [name for name, _, _ in run_tests(engine, 4, 0, 1)] == ["pp4"]
    assert [name for name, _, _ in run_tests(engine, 0, 4, 1)] == ["tg4"]


def test_one_repeat_has_no_deviation(engine: Engine) -> None:
    ((_, _, deviation),) = run_tests(engine, 4, 0, 1)
    assert deviation == 0.0


def test_more_than_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(OptionError, match="depth 40 and 9 tokens do not fit in a context of 48"):
        list(run_tests(engine, 9, 2, 1, depth=40))
    assert len(list(run_tests(engine, 8, 8, 1, depth=40))) == 2


def test_shapes_have_the_sizes_they_are_named_for() -> None:
    billions = {name: parameters(spec) / 1e9 for name, spec in SHAPES.items()}
    assert billions == pytest.approx(
        {
            "qwen2.5-0.5b": 0.494,
            "llama-3.2-1b": 1.236,
            "llama-3.2-3b": 3.213,
            "qwen3-4b": 4.022,
            "llama-3.1-8b": 8.030,
            "gemma-3-1b": 1.000,
            "phi-4-mini": 3.836,
            "smollm3-3b": 3.075,
            "gpt-oss-20b": 20.915,
            "deepseek-v2-lite": 15.706,
            "prosparse-llama-2-7b": 6.738,
            "olmoe-1b-7b": 6.919,
            "qwen3-30b-a3b": 30.532,
        },
        abs=6e-4,
    )


def test_unknown_shape_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        OptionError, match=r"there is no shape 'big'; there are: qwen2.5-0.5b, .*llama-3.2-1b"
    ):
        shape("big")


def test_random_weights_run_the_machine_code_of_a_file(tiny_file: Path) -> None:
    """Else `warmup` and `bench --shape` compile other kernels than a model file needs."""
    with ErtFile.open(tiny_file) as file:
        assert numba.typeof(random_weights(SPEC, "q4").data) == numba.typeof(file.data)


def test_forwards_of_some_rows_start_where_they_are_told(
    engine: Engine, passes: list[tuple[int, int]]
) -> None:
    results = list(run_tests(engine, 0, 0, repeats=2, depth=5, rows=(1, 4)))
    assert [name for name, _, _ in results] == ["fw1@d5", "fw4@d5"]
    assert all(mean > 0 for _, mean, _ in results)
    assert passes == [(0, 5)] + 3 * (4 * [(5, 1)] + 4 * [(5, 4)])


def test_a_tokens_time_is_divided(engine: Engine) -> None:
    seconds, outside = token_time(engine, 9)
    assert seconds > 0
    assert 0 < outside < 1
    assert engine.forward.cache.length == 0


@pytest.mark.parametrize("rows", ["0", "65", "1,x", "-4", "2.5"])
def test_rows_that_are_no_numbers_of_rows_are_refused(rows: str, cli: Any) -> None:
    done = cli("bench", "--shape", "qwen2.5-0.5b", "--rows", rows)
    assert done.status == 2
    assert "expected numbers from 1 to 64" in done.err
