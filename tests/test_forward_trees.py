"""Token trees: each row is what plain decoding of its path gives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import UsageError
from edgert.state import MAX_OUTPUTS
from tests import kernel_inputs as inputs
from tests.forward_models import EVERY, LENGTH, TWO, feed, few, forward, path_to, tokens_of, trees


@EVERY
@few
@given(data=st.data())
def test_a_token_tree_equals_plain_decoding_of_each_path(name: str, data: st.DataObject) -> None:
    parents, seed = data.draw(trees()), data.draw(st.integers(0, 99))
    prompt = tokens_of(name, seed, data.draw(st.integers(0, LENGTH - 20)))
    tokens = tokens_of(name, seed + 1000, len(parents))
    after = tokens_of(name, seed + 2000, 5)
    leaves = [row for row in range(len(parents)) if row not in parents]
    accepted = data.draw(st.sampled_from([path_to(parents, row) for row in range(len(parents))] + [[]]))
    with forward(name) as tree, forward(name) as line:
        for model in (tree, line):
            if prompt:
                model.run(prompt)
        found = tree.run(tokens, parents=parents, outputs=range(len(parents))).copy()
        assert tree.cache.length == len(prompt)
        for leaf in leaves:
            path = path_to(parents, leaf)
            inputs.same(found[path], feed(line, [tokens[row] for row in path], [1] * len(path)))
            line.cache.rewind(len(prompt))
        tree.cache.keep([len(prompt) + row for row in accepted])
        assert tree.cache.length == len(prompt) + len(accepted)
        if accepted:
            feed(line, [tokens[row] for row in accepted], [1] * len(accepted))
        inputs.same(feed(tree, after, [2, 3]), feed(line, after, [1] * 5))


@TWO
def test_a_tree_may_follow_a_tree(name: str) -> None:
    """Each over the slots of the one before: a draft that was refused is forgotten."""
    tokens = tokens_of(name, 5, 33)
    with forward(name) as tree, forward(name) as line:
        tree.run(tokens[:13])
        tree.run([1] * 9, parents=[-1, 0, 1, 2, 0, 4, 4, -1, 7])
        found = tree.run(tokens[13:17], parents=[-1, -1, 0, 2], outputs=[3]).copy()
        line.run(tokens[:13])
        inputs.same(found, line.run([tokens[13], tokens[15], tokens[16]], outputs=[2]).copy())


@EVERY
@few
@given(data=st.data())
def test_a_tree_may_grow_level_by_level_and_from_a_kept_branch(name: str, data: st.DataObject) -> None:
    parents = data.draw(trees())
    count, prompt = len(parents), tokens_of(name, 60, 11)
    tokens = tokens_of(name, 61, count)
    cut = data.draw(st.integers(1, count))
    kept = path_to(parents, data.draw(st.integers(0, count - 1)))
    below = [row for row in range(count) if kept == path_to(parents, row)[: len(kept)]]
    node = data.draw(st.sampled_from(below))  # a leaf grows here, once the branch is kept
    with forward(name) as grown, forward(name) as whole:
        for model in (grown, whole):
            model.run(prompt)
        expected = whole.run(tokens, parents=parents, outputs=range(count)).copy()
        first = grown.run(tokens[:cut], parents=parents[:cut], outputs=range(cut)).copy()
        inputs.same(first, expected[:cut])
        if cut < count:
            rest = count - cut
            second = grown.run(tokens[cut:], parents=parents[cut:], behind=cut, outputs=range(rest)).copy()
            inputs.same(second, expected[cut:])
        grown.keep(kept)
        parent = -1 if node == kept[-1] else node - len(kept)
        leaf = grown.run([7], parents=[parent], behind=count - len(kept), outputs=[0]).copy()
        whole.run([tokens[row] for row in path_to(parents, node)])
        inputs.same(leaf, whole.run([7], outputs=[0]).copy())


def test_a_tree_grows_only_from_rows_it_has() -> None:
    with forward("gqa-q4-f16") as model:
        model.run([1, 2])
        model.run([3, 4], parents=[-1, 0])
        with pytest.raises(UsageError, match="3 rows behind, expected at most the 2 of the tree"):
            model.run([5], parents=[-1], behind=3)
        with pytest.raises(UsageError, match="row 0 of a tree has parent 2"):
            model.run([5], parents=[2], behind=2)


@TWO
def test_the_deepest_tree_is_a_sequence(name: str) -> None:
    tokens = tokens_of(name, 6, MAX_OUTPUTS)
    chain = list(range(-1, MAX_OUTPUTS - 1))
    with forward(name) as tree, forward(name) as line:
        found = tree.run(tokens, parents=chain, outputs=range(MAX_OUTPUTS)).copy()
        inputs.same(found, feed(line, tokens, [MAX_OUTPUTS]))


@pytest.mark.compiled
@TWO
def test_threads_do_not_change_a_tree(name: str) -> None:
    parents = [-1, 0, 0, 1, 1, 2, -1, 6, 7, 3, 9, 10]
    tokens = tokens_of(name, 7, len(parents))
    results = []
    for threads in (1, 3):
        with forward(name, threads) as model:
            model.run(tokens_of(name, 8, 21))
            results.append(model.run(tokens, parents=parents, outputs=range(len(parents))).copy())
    inputs.same(*results)
