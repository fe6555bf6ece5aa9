"""The one forward path: however rows are grouped, whoever computes them, the bits are the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import ContextLengthError, UsageError
from tests import kernel_inputs as inputs
from tests.forward_models import CASES, CONTEXT, EVERY, LENGTH, cuts, feed, few, forward, plain, tokens_of


@EVERY
@few
@given(data=st.data())
def test_chunks_of_any_size_give_the_same_bits(name: str, data: st.DataObject) -> None:
    expected, cached = plain(name, 1, LENGTH)
    tokens = tokens_of(name, 1, LENGTH)
    pieces = data.draw(st.just([LENGTH]) | cuts(LENGTH))
    with forward(name) as model:
        inputs.same(feed(model, tokens, pieces), expected)
        inputs.same(model.cache.data, cached)


@EVERY
def test_only_the_wanted_rows_are_given_in_their_order(name: str) -> None:
    expected, _ = plain(name, 1, LENGTH)
    wanted = [LENGTH - 1, 3, 17, 3]
    with forward(name) as model:
        inputs.same(model.run(tokens_of(name, 1, LENGTH), outputs=wanted).copy(), expected[wanted])
        hidden = model.run(tokens_of(name, 2, 2))
        assert hidden.shape == (2, CASES[name].spec.width)


@pytest.mark.compiled
@EVERY
@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(name: str, threads: int) -> None:
    expected, cached = plain(name, 1, 60)
    for pieces in ([60], [1] * 12 + [48], [17, 2, 41]):
        with forward(name, threads) as model:
            inputs.same(feed(model, tokens_of(name, 1, 60), pieces), expected)
            inputs.same(model.cache.data, cached)


@EVERY
@few
@given(seed=st.integers(0, 99), kept=st.integers(0, LENGTH - 20), lost=st.integers(0, 30))
def test_what_is_rewound_is_forgotten(name: str, seed: int, kept: int, lost: int) -> None:
    start, other, after = (tokens_of(name, seed + n, c) for n, c in ((0, kept), (1, lost), (2, 9)))
    with forward(name) as model, forward(name) as fresh:
        for part in (start, other):
            if part:
                model.run(part)
        model.cache.rewind(kept)
        found = feed(model, after, [4, 5])
        if start:
            fresh.run(start)
        inputs.same(found, feed(fresh, after, [9]))


def test_rewinding_forward_is_refused() -> None:
    with forward("gqa-q4-f16") as model:
        model.run([1, 2])
        for length in (-1, 3):
            with pytest.raises(ValueError, match="cannot rewind"):
                model.cache.rewind(length)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    with forward("gqa-q4-f16", chunk=8) as model:
        model.run([1, 2, 3])
        with pytest.raises(UsageError, match="9 rows in one forward, expected 1 to 8"):
            model.run([1] * 9)
        with pytest.raises(UsageError, match="0 rows"):
            model.run([])
        for token in (-1, model.spec.vocab):
            with pytest.raises(UsageError, match=f"token {token} in a forward, expected ids from 0 to"):
                model.run([1, token])
        for row in (-1, 2):
            with pytest.raises(UsageError, match="expected rows from 0 to 1"):
                model.run([1, 2], outputs=[0, row])
        with pytest.raises(UsageError, match="65 rows of logits"):
            model.run([1], outputs=[0] * 65)
        for parents in ([0], [-2], [-1, 1]):
            with pytest.raises(UsageError, match="of a tree has parent"):
                model.run([1] * len(parents), parents=parents)
        for _ in range(9):
            model.run([1] * 8)
        model.run([1] * 5)
        assert model.cache.length == CONTEXT
        with pytest.raises(ContextLengthError, match="81 tokens do not fit in a context of 80"):
            model.run([1])
        assert model.cache.length == CONTEXT
