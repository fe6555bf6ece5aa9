"""Exact tokens, whatever the threads, the chunks and the cache before them."""

from pathlib import Path

import numba
import numpy as np
import pytest

import edgert
from edgert.config import Quant, SamplingParams
from edgert.engine import Engine
from edgert.format import ErtFile
from edgert.planner import plan
from edgert.sampling import Sampler
from edgert.state import Weights

PROMPT = "Once upon"
COUNT = 32

# Of the model `tiny_folder` at temperature 0; `PYTHONPATH=. python tests/test_engine.py` prints them anew.
GREEDY = {
    "f32": "61 85 22 66 89 7 34 57 91 32 53 61 31 80 33 61 31 58 24 37 78 31 58 24 37 78 31 80 61 83 27 1",
    "f16": "61 85 22 66 89 7 34 57 91 32 53 61 31 80 33 61 31 58 24 37 78 31 58 24 37 78 31 80 61 83 27 1",
    "q8": "61 85 22 66 89 7 34 57 91 32 53 61 31 80 33 61 31 58 24 37 78 31 58 24 83 27 1 86 66 89 37 78",
    "q4": "61 85 22 66 89 7 34 57 91 61 31 80 33 61 31 80 33 61 31 80 33 61 85 22 66 89 37 78 31",
}
GREEDY_Q8_CACHE = (
    "61 85 22 66 89 7 34 57 91 32 53 61 31 80 33 61 31 58 24 37 78 31 58 24 37 78 31 80 61 83 27 1"
)
# From the weights in q4, at temperature 1.2, top-k 40, seed 3.
SAMPLED = "90 65 33 92 94 69 45 31 39 61 54 24 52 66 89 4 26 29 52 52 77 54 10 61 83 89 85 79 15 43 60 9"


@pytest.fixture(scope="module")
def files(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Quant, Path]:
    return converted(tiny_folder, tmp_path_factory.mktemp("quants"))


def converted(source: Path, folder: Path) -> dict[Quant, Path]:
    quants: tuple[Quant, ...] = ("f32", "f16", "q8", "q4")
    for quant in quants:
        edgert.convert(source, folder / f"{quant}.ert", quant=quant)
    return {quant: folder / f"{quant}.ert" for quant in quants}


@pytest.mark.parametrize(("threads", "chunk"), [(1, None), (2, None), (1, 1), (2, 7)])
@pytest.mark.parametrize("quant", ["f32", "f16", "q8", "q4"])
def test_greedy_tokens_are_exact(
    files: dict[Quant, Path], quant: Quant, threads: int, chunk: int | None
) -> None:
    if numba.config.DISABLE_JIT and (threads, chunk) != (1, None) and quant != "q4":
        pytest.skip("one precision is enough where every pass takes long")
    with edgert.load(files[quant], threads=threads, chunk=chunk) as model:
        assert greedy(model) == GREEDY[quant]


@pytest.mark.parametrize(("threads", "chunk"), [(1, None), (2, 7)])
def test_greedy_tokens_of_a_q8_cache_are_exact(
    files: dict[Quant, Path], threads: int, chunk: int | None
) -> None:
    with edgert.load(files["f32"], threads=threads, chunk=chunk, kv="q8") as model:
        assert greedy(model) == GREEDY_Q8_CACHE


@pytest.mark.parametrize(("threads", "chunk"), [(1, None), (2, 7), (3, 1)])
def test_sampled_tokens_are_exact(files: dict[Quant, Path], threads: int, chunk: int | None) -> None:
    with edgert.load(files["q4"], threads=threads, chunk=chunk) as model:
        assert sampled(model) == SAMPLED


def spelled(done: edgert.Completion) -> str:
    return " ".join(map(str, done.tokens))


def greedy(model: edgert.Model) -> str:
    return spelled(model.generate(PROMPT, max_tokens=COUNT))


def sampled(model: edgert.Model) -> str:
    return spelled(model.generate(PROMPT, max_tokens=COUNT, temperature=1.2, top_k=40, seed=3))


@pytest.mark.parametrize("kv", ["f16", "q8"])
def test_logits_are_the_same_bits_on_any_threads(files: dict[Quant, Path], kv: str) -> None:
    tokens = list(range(3, 40))
    found = []
    for threads, chunk in ((1, None), (2, 5), (4, 16)):
        with edgert.load(files["q4"], threads=threads, chunk=chunk, kv=kv) as model:
            found.append(model.logits(tokens))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_smaller_context_changes_nothing_within_it(files: dict[Quant, Path]) -> None:
    with edgert.load(files["q8"], threads=1, context=len(PROMPT) + 10) as model:
        done = model.generate(PROMPT, max_tokens=COUNT)
    assert spelled(done) == " ".join(GREEDY["q8"].split()[:11])
    assert done.finish_reason == "length"


def test_step_computes_a_chunk_and_chooses_after_the_last(files: dict[Quant, Path]) -> None:
    with ErtFile.open(files["f32"]) as file:
        engine = Engine(Weights.of_file(file), plan(file.spec, file.size, threads=1, chunk=4))
        sampler = Sampler(SamplingParams(), file.spec.vocab)
        sequence = engine.sequence
        assert engine.start([5, 6, 7, 8, 9, 10], sampler) == 0
        assert sequence.pending == 6
        assert engine.step() == []
        assert sequence.pending == 2
        ((choice, source, _),) = engine.step()
        assert source == "model"
        assert sequence.tokens == [5, 6, 7, 8, 9, 10, choice.token]
        assert sequence.pending == 1 and not sequence.full
        assert engine.start([5, 6, 7, 8, 20], sampler) == 4
        assert sequence.tokens == [5, 6, 7, 8, 20] and sequence.pending == 1
        engine.close()


def test_interrupted_pass_is_repeated(files: dict[Quant, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with edgert.load(files["f32"], threads=1, chunk=8) as model:
        run, calls = model._engine.forward.team.run, iter(range(100))

        def run_with_an_interrupt() -> None:
            run()
            if next(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(model._engine.forward.team, "run", run_with_an_interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPT, max_tokens=COUNT)
        assert greedy(model) == GREEDY["f32"]


def show_goldens() -> None:
    """Print the literals at the top of this file."""
    import tempfile

    from tests import tiny_models

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        tiny_models.write_folder(source, "llama_head_dim")
        paths = converted(source, Path(scratch))
        for quant, path in paths.items():
            with edgert.load(path, threads=1) as model:
                print(f'    "{quant}": "{greedy(model)}",')
        with edgert.load(paths["f32"], threads=1, kv="q8") as model:
            print(f'GREEDY_Q8_CACHE = "{greedy(model)}"')
        with edgert.load(paths["q4"], threads=1) as model:
            print(f'SAMPLED = "{sampled(model)}"')


if __name__ == "__main__":
    show_goldens()
