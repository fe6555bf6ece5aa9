"""Behind a prompt only the neurons that it used most are computed; which those are depends on it alone."""

from contextlib import closing
from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any

import numba
import numpy as np
import pytest

from edgert.config import EngineConfig, ModelSpec
from edgert.errors import UsageError
from edgert.kernels import neuron_packing, program
from edgert.model.cores import TOKEN_SHARE, token_cores
from edgert.model.forward import EVERYWHERE_WHOLE, Forward
from edgert.state import Weights
from tests import kernel_inputs as inputs
from tests.neuron_weights import one_by_one, without_gates

CONTEXT, PROMPT, SHARE = 80, 18, 0.3
# Widths that fill no span, slice, block or cluster; gates without zeros, and with many.
SMALL = ModelSpec("llama", 2, 40, 4, 2, 10, 72, 83, CONTEXT, 1e-5, "silu")
WIDE = ModelSpec("qwen3", 2, 544, 4, 2, 16, 100, 67, CONTEXT, 1e-5, "relu2", True, True, qk_norm=True)
SPECS = {"small": SMALL, "wide": WIDE}
NAMES = ["small"] if numba.config.DISABLE_JIT else list(SPECS)
ROWS = (1, 3, 9) if numba.config.DISABLE_JIT else (1, 2, 3, 8, 9, 20)
PIECES = [[PROMPT], [1] * PROMPT, [7, 11], [9, 1, 8]]
"""Ways to cut a prompt."""


@cache
def dense(name: str, quant: str) -> Weights:
    return inputs.tiny_weights(SPECS[name], lambda tensor: quant)


def tokens_of(label: Any, count: int) -> list[int]:
    return [int(t) for t in inputs.whole((label, "tokens"), 0, 66, count)]


def forward(weights: Weights, threads: int = 1, sequences: int = 1, **options: Any) -> Forward:
    return Forward(weights, EngineConfig(threads, CONTEXT, 32, sequences=sequences, **options))


def cored(name: str, quant: str, **options: Any) -> Forward:
    return forward(one_by_one(dense(name, quant), core=SHARE), predict=True, **options)


def feed(model: Forward, tokens: list[int], rows: int, sequence: int = 0) -> Any:
    """Logits of tokens that are given `rows` at a time."""
    found = []
    for start in range(0, len(tokens), rows):
        part = tokens[start : start + rows]
        found.append(model.run(part, outputs=range(len(part)), sequences=[sequence] * len(part)).copy())
    return np.concatenate(found)


def by_hand(h: Any) -> Any:
    """The core of a layer, bool [F], of what its neurons add to the rows of a prompt, h [T, F]."""
    counts = [0] * h.shape[1]
    for row in np.abs(h).tolist():
        working = sorted((n for n, size in enumerate(row) if size > 0), key=lambda n: -row[n])
        for n in working[: ceil(TOKEN_SHARE * len(working))]:
            counts[n] += 1
    order = sorted(range(len(counts)), key=lambda n: (-counts[n], n))
    return np.isin(np.arange(len(counts)), order[: round(SHARE * len(counts))])


def cut_by_hand(name: str, quant: str, prompt: list[int], after: list[int]) -> tuple[Any, Any]:
    """Logits of `after` behind a prompt, and the cores [L, F]: by whole matrices without the other gates."""
    whole, seen = dense(name, quant), []
    with closing(forward(whole)) as model:
        f, code = model.state.f, model.code
        gates = [i for i, row in enumerate(code) if row[0] == program.GATE]

        def see(gate: Any, count: int) -> None:
            at, stride = int(gate[4]), int(gate[6])
            rows = f[at : at + count * stride].reshape(count, stride)
            seen.append(rows[:, : whole.spec.ffn_width].copy())

        model.watch = {i + 1: lambda count, i=i: see(code[i], count) for i in gates}
        model.run(prompt)
        cores = np.stack([by_hand(h) for h in seen])
        with closing(forward(without_gates(whole, cores))) as rest:
            rest.cache.data[:] = model.cache.data
            rest.cache.length = len(prompt)
            return feed(rest, after, 20), cores


@pytest.mark.parametrize("quant", neuron_packing.QUANTS)
@pytest.mark.parametrize("name", NAMES)
def test_other_neurons_are_as_if_their_gates_were_zero(name: str, quant: str) -> None:
    prompt, after = tokens_of("prompt", PROMPT), tokens_of("after", 20)
    expected, cores = cut_by_hand(name, quant, prompt, after)
    assert not (cores[0] == cores[1]).all()
    for threads, rows in ((1, 1), *((3, rows) for rows in ROWS)):
        pieces = PIECES[rows % len(PIECES)]
        with closing(cored(name, quant, threads=threads)) as model:
            for start, size in zip(np.cumsum([0, *pieces]), pieces, strict=False):
                model.run(prompt[start : start + size])
            model.freeze()
            gated = model.gated
            inputs.same(feed(model, after, rows), expected)
            if rows == 1:
                read, of = (now - before for now, before in zip(model.gated, gated, strict=True))
                assert read == 20 * model.spec.layers * round(SHARE * model.spec.ffn_width)
                assert of == 20 * model.spec.layers * model.spec.ffn_width


def test_until_the_prompt_is_through_and_where_it_is_refused_all_is_computed() -> None:
    tokens = tokens_of("prompt", 40)
    with closing(forward(dense("small", "q4"))) as model:
        expected = feed(model, tokens, 20)
    with closing(cored("small", "q4")) as model:
        inputs.same(feed(model, tokens, 9), expected)
        model.freeze()
        model.whole = EVERYWHERE_WHOLE
        model.resume(PROMPT)
        inputs.same(feed(model, tokens, 3), expected)
    with closing(forward(one_by_one(dense("small", "q4"), core=SHARE))) as model:
        inputs.same(feed(model, tokens, 9), expected)
        model.freeze()
        assert model.gated == (0, 0)


@pytest.mark.compiled
def test_a_sequence_sees_no_core_but_its_own() -> None:
    prompts = [tokens_of(i, PROMPT + i) for i in range(3)]
    after = [tokens_of(("after", i), 6) for i in range(3)]
    expected = [cut_by_hand("small", "q8", *pair) for pair in zip(prompts, after, strict=True)]
    assert not np.array_equal(expected[0][1], expected[1][1])
    with closing(cored("small", "q8", threads=2, sequences=3)) as model:
        model.run(prompts[0] + prompts[2][:5], sequences=[0] * len(prompts[0]) + [2] * 5)
        model.freeze(0)
        # A row of each: the first goes on with its core, the second begins, the third is in its prompt.
        found = model.run(
            [after[0][0], prompts[1][0], prompts[2][5]], outputs=range(3), sequences=[0, 1, 2]
        ).copy()
        inputs.same(found[0], expected[0][0][0])
        model.run(prompts[1][1:], sequences=[1] * (len(prompts[1]) - 1))
        model.run(prompts[2][6:], sequences=[2] * (len(prompts[2]) - 6))
        model.freeze(1)
        model.freeze(2)
        for at in range(1, 6):
            order = [2, 0, 1]
            tokens = [after[s][at - (s > 0)] for s in order]
            found = model.run(tokens, outputs=range(3), sequences=order).copy()
            for row, s in enumerate(order):
                inputs.same(found[row], expected[s][0][at - (s > 0)])


def test_a_tree_takes_the_core_of_its_sequence() -> None:
    prompt, after = tokens_of("prompt", PROMPT), tokens_of("after", 3)
    expected, _ = cut_by_hand("small", "q4", prompt, after)
    with closing(cored("small", "q4")) as model:
        model.run(prompt)
        model.freeze()
        tree = [after[0], 5, after[1], after[2]]
        found = model.run(tree, parents=[-1, 0, 0, 2], outputs=range(4)).copy()
        inputs.same(found[[0, 2, 3]], expected)
        model.keep([0, 2])
        inputs.same(feed(model, after[2:], 1), expected[2:])


def test_another_prompt_begins_with_what_is_whole_and_counted() -> None:
    """The newest position can be taken back, so that the same prompt can be asked again; others not."""
    first, after = tokens_of("prompt", PROMPT), tokens_of("after", 4)
    longer = [*first, *after, *tokens_of("more", 8)]
    for shared, kept, prompt in (
        (PROMPT - 1, PROMPT - 1, first),
        (PROMPT - 1, PROMPT - 1, [*first[:-1], 1, 2]),
        (PROMPT, PROMPT, longer),
        (PROMPT + 3, PROMPT, longer),
        (PROMPT - 2, 0, [*first[:-2], 3]),
        (0, 0, after * 5),
    ):
        expected, _ = cut_by_hand("small", "q4", prompt, after)
        with closing(cored("small", "q4")) as model:
            model.run(first)
            model.freeze()
            feed(model, after, 1)
            assert model.resume(shared) == model.cache.length == kept
            for token in prompt[kept:]:
                model.run([token])
            model.freeze()
            inputs.same(feed(model, after, 1), expected)


def test_two_positions_cannot_be_taken_back() -> None:
    with closing(cored("small", "q4")) as model:
        model.run(tokens_of("prompt", PROMPT))
        assert model.resume(PROMPT - 1) == PROMPT - 1
        assert model.resume(PROMPT - 2) == 0
        model.run([1, 2, 3])
        model.cache.rewind(2)
        with pytest.raises(UsageError, match=r"goes on behind 2 positions, but its core was counted over 3"):
            model.run([1])
        model.cache.rewind(0)  # anew
        model.run([1])


def test_the_core_of_a_token_is_what_adds_most_of_what_adds_anything() -> None:
    h = np.array(
        [
            [0, -5, 1, 2, 0, 0, 0, 0, 3, 4],  # two of five
            [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],  # equal ones all
            [0, 0, 0, 0, 0, 0, 0, 0, 0, -1e-30],
            [0] * 10,
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        ],
        np.float32,
    )
    expected = ["0100000001", "1111100000", "0000000001", "0000000000", "0000001111"]
    assert ["".join(str(int(n)) for n in row) for row in token_cores(h, 0.4)] == expected


def test_a_spec_with_a_core_that_cannot_be_is_refused() -> None:
    for core in (1, -0.1, "half", True, 1.5):
        with pytest.raises(ValueError, match="core is"):
            replace(SMALL, neurons=True, core=core)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"core is 0\.3 with predictors or without neurons"):
        replace(SMALL, core=0.3)
    with pytest.raises(ValueError, match=r"core is 0\.3 with predictors or without neurons"):
        replace(SMALL, neurons=True, core=0.3, predictors=(32, 32))
    assert ModelSpec.from_json(replace(SMALL, neurons=True, core=0.25).to_json()).core == 0.25
