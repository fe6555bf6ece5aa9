"""Rows of several sequences in one forward: each is what it would be alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.config import EngineConfig
from edgert.errors import ContextLengthError, UsageError
from edgert.model.forward import Forward
from tests import kernel_inputs as inputs
from tests.forward_models import (
    CASES,
    CHUNK,
    CONTEXT,
    EVERY,
    LENGTH,
    TWO,
    feed,
    few,
    forward,
    plain,
    tokens_of,
    weights,
)


@contextmanager
def shared(name: str, sequences: int, threads: int = 1) -> Iterator[Forward]:
    made = Forward(weights(name), EngineConfig(threads, CONTEXT, CHUNK, CASES[name].kv, sequences))
    try:
        yield made
    finally:
        made.close()


@EVERY
@few
@given(data=st.data())
def test_rows_of_several_sequences_side_by_side_are_those_of_each_alone(
    name: str, data: st.DataObject
) -> None:
    count = data.draw(st.integers(2, 4))
    texts = [tokens_of(name, 40 + s, LENGTH) for s in range(count)]
    rounds = st.lists(st.integers(0, count - 1), min_size=1, max_size=CHUNK)
    done = [0] * count
    found: list[list[inputs.F32]] = [[] for _ in range(count)]
    with shared(name, count, data.draw(st.sampled_from([1, 3]))) as model:
        for _ in range(4):
            order: list[int] = []
            for sequence in data.draw(rounds):
                if done[sequence] + order.count(sequence) < LENGTH:
                    order.append(sequence)
            if not order:
                continue
            places = [done[s] + order[:row].count(s) for row, s in enumerate(order)]
            rows = [texts[s][place] for s, place in zip(order, places, strict=True)]
            logits = model.run(rows, outputs=range(len(rows)), sequences=order)
            for row, sequence in enumerate(order):
                found[sequence].append(logits[row].copy())
                done[sequence] += 1
        assert model.cache.lengths == done
    for sequence in range(count):
        if done[sequence]:
            expected, _ = plain(name, 40 + sequence, LENGTH)
            inputs.same(np.stack(found[sequence]), expected[: done[sequence]])


@TWO
def test_trees_of_several_sequences_side_by_side_are_those_of_each_alone(name: str) -> None:
    prompts = [tokens_of(name, 50, 19), tokens_of(name, 51, 7)]
    order = [1, 0, 0, 1, 1, 0, 1, 0]
    parents = [-1, -1, 1, 0, 0, 1, 3, 5]
    tokens = tokens_of(name, 52, len(order))
    kept = {0: [1, 5, 7], 1: [0, 3, 6]}
    with shared(name, 2) as model:
        for sequence, prompt in enumerate(prompts):
            model.run(prompt, sequences=[sequence] * len(prompt))
        found = model.run(tokens, parents=parents, sequences=order, outputs=range(len(order))).copy()
        assert model.cache.lengths == [19, 7]
        for sequence, rows in kept.items():
            own = [row for row, s in enumerate(order) if s == sequence]
            model.cache.keep([len(prompts[sequence]) + own.index(row) for row in rows], sequence)
        after = model.run([3, 4], sequences=[0, 1], outputs=[0, 1]).copy()
        model.cache.rewind(2, 1)
        assert model.cache.lengths == [19 + 3 + 1, 2]
    for sequence, rows in kept.items():
        with forward(name) as alone:
            alone.run(prompts[sequence])
            inputs.same(found[rows], feed(alone, [tokens[row] for row in rows], [1] * len(rows)))
            inputs.same(after[sequence], feed(alone, [3 + sequence], [1])[0])


def test_a_sequence_or_a_parent_of_another_is_refused() -> None:
    with shared("gqa-q4-f16", 2) as model:
        with pytest.raises(UsageError, match="a row of sequence 2; the cache holds 2"):
            model.run([1], sequences=[2])
        with pytest.raises(UsageError, match="row 1 of a tree has parent 0"):
            model.run([1, 2], sequences=[0, 1], parents=[-1, 0])
        model.run([1] * 60, sequences=[1] * 60)
        with pytest.raises(ContextLengthError, match="82 tokens do not fit"):
            model.run([1] * 23, sequences=[0] + [1] * 22)
        assert model.cache.lengths == [0, 60]
