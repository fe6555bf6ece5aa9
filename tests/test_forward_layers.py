"""A forward of some layers, files that hold some, and heads behind some: together they are the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.config import EngineConfig
from edgert.errors import UsageError
from edgert.model.forward import Forward
from tests import kernel_inputs as inputs
from tests.forward_models import (
    CASES,
    CHUNK,
    CONTEXT,
    EVERY,
    LENGTH,
    TWINS,
    TWO,
    cuts,
    few,
    forward,
    part_of,
    plain,
    tokens_of,
)


@EVERY
@pytest.mark.parametrize("cut", [0, 1, 99])
def test_two_halves_are_the_whole(name: str, cut: int) -> None:
    """An edge with the lower layers, token by token, and a cloud with the rest, in a batch."""
    layers = CASES[name].spec.layers
    cut = min(cut, layers)
    expected, cached = plain(name, 1, LENGTH)
    tokens = tokens_of(name, 1, LENGTH)
    with forward(name) as edge, forward(name) as cloud:
        at, rows = 0, []
        for size in (7, 1, 1, LENGTH - 9):
            part = tokens[at : at + size]
            at += size
            hidden = [edge.run([token], layers=(0, cut)).copy() for token in part]
            rows.append(
                cloud.run(
                    part, layers=(cut, layers), hidden=np.concatenate(hidden), outputs=range(size)
                ).copy()
            )
        inputs.same(np.concatenate(rows), expected)
        border = edge.cache.layer(cut)
        inputs.same(edge.cache.data[:border], cached[:border])
        inputs.same(cloud.cache.data[border:], cached[border:])
        assert not edge.cache.data[border:].any()
        assert not cloud.cache.data[:border].any()
        assert edge.cache.length == cloud.cache.length == LENGTH


@TWO
def test_a_tree_may_be_cut_between_layers(name: str) -> None:
    parents = [-1, 0, 0, 1, -1, 4, 2]
    tokens, prompt = tokens_of(name, 9, 7), tokens_of(name, 10, 18)
    layers = CASES[name].spec.layers
    with forward(name) as whole, forward(name) as edge, forward(name) as cloud:
        whole.run(prompt)
        cloud.run(prompt, layers=(1, layers), hidden=edge.run(prompt, layers=(0, 1)))
        hidden = edge.run(tokens, parents=parents, layers=(0, 1))
        found = cloud.run(tokens, parents=parents, layers=(1, layers), hidden=hidden, outputs=range(7))
        inputs.same(found.copy(), whole.run(tokens, parents=parents, outputs=range(7)).copy())


@EVERY
def test_the_halves_of_a_split_model_are_the_whole(name: str) -> None:
    layers = CASES[name].spec.layers
    expected, cached = plain(name, 1, LENGTH)
    tokens, config = tokens_of(name, 1, LENGTH), EngineConfig(1, CONTEXT, CHUNK, CASES[name].kv)
    edge, cloud = Forward(part_of(name, 0, 1), config), Forward(part_of(name, 1, layers), config)
    try:
        hidden = edge.run(tokens)
        inputs.same(cloud.run(tokens, hidden=hidden, outputs=range(LENGTH)).copy(), expected)
        inputs.same(np.concatenate([edge.cache.data, cloud.cache.data]), cached)
        for half, layer in ((edge, (0, 2)), (cloud, (0, layers))):
            with pytest.raises(UsageError, match="which this model holds"):
                half.run([1], layers=layer)
    finally:
        edge.close()
        cloud.close()


EXITING = pytest.mark.parametrize(
    "name", ["exits-q4-f16"] if TWINS else ["exits-q4-f16", "exits-mixed-q8", "exits-f32-f16"]
)


@EXITING
@few
@given(data=st.data())
def test_an_exit_says_the_same_for_any_rows(name: str, data: st.DataObject) -> None:
    layer = data.draw(st.sampled_from(CASES[name].spec.exits))
    tokens = tokens_of(name, 11, LENGTH)
    with forward(name) as alone, forward(name) as together:
        expected = [alone.run([token], layers=(0, layer), outputs=[0]).copy() for token in tokens]
        found, at = [], 0
        for size in data.draw(cuts(LENGTH)):
            part = tokens[at : at + size]
            found.append(together.run(part, layers=(0, layer), outputs=range(size)).copy())
            at += size
    inputs.same(np.concatenate(found), np.concatenate(expected))


@pytest.mark.compiled
@EXITING
def test_threads_do_not_change_an_exit(name: str) -> None:
    (layer, *_), tokens, found = CASES[name].spec.exits, tokens_of(name, 12, 31), []
    for threads in (1, 3):
        with forward(name, threads) as model:
            found.append(model.run(tokens, layers=(0, layer), outputs=[30, 0, 7]).copy())
            found.append(model.run(tokens, layers=(layer, 3), outputs=[30, 0, 7]).copy())
    inputs.same(found[0], found[2])
    inputs.same(found[1], found[3])


@EXITING
def test_going_on_behind_an_exit_gives_the_whole_model(name: str) -> None:
    """Token by token and in chunks, with and without asking the exit, through one exit or two."""
    expected, cached = plain(name, 1, LENGTH)
    tokens, layers = tokens_of(name, 1, LENGTH), CASES[name].spec.layers
    for exits in (CASES[name].spec.exits, CASES[name].spec.exits[-1:]):
        with forward(name) as model:
            at, rows = 0, []
            for size in (1, 6, 1, LENGTH - 8):
                part = tokens[at : at + size]
                at += size
                first = 0
                for layer in exits:
                    hidden = model.run(part, layers=(first, layer)).copy()
                    model.run(part, layers=(layer, layer), outputs=[size - 1])
                    inputs.same(model.hidden.copy(), hidden)  # an exit leaves the residual rows as they were
                    first = layer
                    assert model.cache.length == at
                rows.append(model.run(part, layers=(first, layers), outputs=range(size)).copy())
                assert model.cache.length == at
            inputs.same(np.concatenate(rows), expected)
            inputs.same(model.cache.data, cached)


@EXITING
def test_a_tree_goes_on_behind_an_exit(name: str) -> None:
    parents, layers = [-1, 0, 0, 1, -1, 4, 2], CASES[name].spec.layers
    layer = CASES[name].spec.exits[-1]
    tokens, prompt = tokens_of(name, 9, 7), tokens_of(name, 10, 13)
    with forward(name) as whole, forward(name) as cut:
        for model in (whole, cut):
            model.run(prompt)
        cut.run(tokens, parents=parents, layers=(0, layer), outputs=[6])
        found = cut.run(tokens, parents=parents, layers=(layer, layers), outputs=range(7)).copy()
        inputs.same(found, whole.run(tokens, parents=parents, outputs=range(7)).copy())
        assert cut.cache.length == len(prompt)


def test_rows_that_are_not_there_cannot_go_on() -> None:
    name = "exits-q4-f16"
    with forward(name) as model:
        with pytest.raises(UsageError, match="3 rows at layer 1 without their hidden values"):
            model.run([1, 2, 3], layers=(1, 3))
        model.run([1, 2, 3], layers=(0, 1))
        for tokens, layers in (([1, 2], (1, 3)), ([1, 2, 3], (2, 3))):
            with pytest.raises(UsageError, match="which the last call did not leave there"):
                model.run(tokens, layers=layers)
        model.cache.rewind(2)
        with pytest.raises(UsageError, match="without their hidden values"):
            model.run([1, 2, 3], layers=(1, 3))
        model.run([3], layers=(0, 1))
        with pytest.raises(UsageError, match="has parent 0"):
            model.run([3], parents=[0], layers=(0, 1))
        with pytest.raises(UsageError, match="without their hidden values"):  # that call spoilt them
            model.run([3], layers=(1, 3))


@EXITING
def test_the_lower_half_of_a_model_has_its_exits(name: str) -> None:
    tokens, (layer, *_) = tokens_of(name, 14, 9), CASES[name].spec.exits
    config = EngineConfig(1, CONTEXT, CHUNK, CASES[name].kv)
    edge = Forward(part_of(name, 0, layer), config)
    with forward(name) as whole:
        found = edge.run(tokens, outputs=[8, 2]).copy()
        inputs.same(found, whole.run(tokens, layers=(0, layer), outputs=[8, 2]).copy())
    edge.close()
    assert part_of(name, layer, 3).spec.held_exits == CASES[name].spec.exits[1:]
