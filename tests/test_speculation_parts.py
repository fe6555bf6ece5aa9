"""What speculation is made of: the tree, what guesses are worth, what rows cost, what is looked up."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import ModelFileError
from edgert.speculation.controller import (
    FIRST_REST,
    FIRST_TRIAL,
    LONGEST_REST,
    MOST_LOST,
    TRIAL,
    Account,
    Controller,
)
from edgert.speculation.costs import RowCost
from edgert.speculation.lookup import read_store, write_store
from edgert.speculation.online import MOST_TOKENS, HeadCorrection
from edgert.speculation.tree import Guess, TokenTree
from edgert.speculation.trie import ORDER, NgramTrie, continuations
from edgert.speculation.trust import Trust


def guess(stated: float, drafter: str = "test") -> Guess:
    return Guess(drafter, stated, Trust())


# ---- the tree --------------------------------------------------------------------------------


@st.composite
def grown(draw: st.DrawFn) -> TokenTree:
    tree = TokenTree(draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 40))):
        parent = draw(st.integers(0, len(tree) - 1))
        tree.add(parent, draw(st.integers(0, 5)), guess(draw(st.floats(0.01, 1.0))))
    return tree


@given(grown())
def test_a_tree_has_each_path_once_and_parents_first(tree: TokenTree) -> None:
    paths = [tuple(tree.tokens[node] for node in tree.path(node)) for node in range(len(tree))]
    assert len(set(paths)) == len(paths)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert parent < node and tree.depths[node] == tree.depths[parent] + 1
        assert tree.children[parent][tree.tokens[node]] == node
        assert tree.logprobs[node] <= tree.logprobs[parent]


@given(grown())
def test_the_best_nodes_are_a_tree_whatever_their_number(tree: TokenTree) -> None:
    ranked = tree.ranked()
    assert sorted(ranked) == list(range(1, len(tree)))
    for place, node in enumerate(ranked):
        assert tree.parents[node] == 0 or tree.parents[node] in ranked[:place]
    scores = [tree.logprobs[node] for node in ranked]
    assert scores == sorted(scores, reverse=True)


@given(grown())
def test_a_node_sees_its_ancestors_and_itself(tree: TokenTree) -> None:
    mask = tree.mask()
    for node in range(len(tree)):
        assert set(np.flatnonzero(mask[node])) == {0, node, *tree.path(node)}


@given(grown(), st.data())
def test_what_stands_below_a_node_is_a_tree_of_its_own(tree: TokenTree, data: st.DataObject) -> None:
    top = data.draw(st.integers(0, len(tree) - 1))
    below, places = tree.below(top)
    assert len(below) == len(places) and places[top] == 0 and below.root == tree.tokens[top]
    assert set(places) == {node for node in range(len(tree)) if top in (0, node, *tree.path(node))}
    for old, new in places.items():
        assert below.tokens[new] == tree.tokens[old]
        assert below.logprobs[new] == pytest.approx(tree.logprobs[old] - tree.logprobs[top])
        if new:
            assert below.parents[new] == places[tree.parents[old]]
            assert below.guesses[new] == tree.guesses[old]


def test_the_surer_of_two_guesses_of_one_token_counts() -> None:
    tree = TokenTree(1)
    node = tree.add(0, 5, guess(0.3, "lookup"))
    assert tree.add(0, 5, guess(0.8, "model")) == node and len(tree) == 2
    assert tree.guesses[node] == tree.guesses[tree.children[0][5]]
    chosen = tree.guesses[node]
    assert chosen is not None and chosen.drafter == "model"
    tree.add(0, 5, guess(0.5, "exit"))
    assert tree.logprobs[node] == pytest.approx(math.log(0.8), abs=0.02)


# ---- what guesses are worth ------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 1.0])
def test_trust_becomes_what_is_seen(share: float) -> None:
    trust, random = Trust(), np.random.default_rng(3)
    for _ in range(300):
        trust.observe(0.85, bool(random.random() < share))
    assert trust.probability(0.85) == pytest.approx(min(share, 0.99), abs=0.08)


def test_guesses_that_fail_lower_the_trust_in_those_of_other_surety() -> None:
    trust = Trust()
    before = trust.probability(0.4)
    for _ in range(30):
        trust.observe(0.9, False)
    assert trust.probability(0.4) < before / 2
    for _ in range(400):
        trust.observe(0.9, True)
    assert trust.probability(0.4) > before / 2


def test_trust_starts_with_what_is_stated() -> None:
    trust = Trust()
    for stated in (0.01, 0.3, 0.9):
        assert trust.probability(stated) == pytest.approx(stated, rel=0.01)


# ---- what rows cost --------------------------------------------------------------------------


def test_cost_of_rows_is_a_line_where_nothing_was_seen() -> None:
    cost = RowCost()
    assert not cost.known and cost.seconds(4) == 0
    cost.observe(1, 1.0)
    assert cost.seconds(1) == pytest.approx(1.0) and 1.0 < cost.seconds(9) < 3.0
    for rows in (1, 5, 9, 17):
        cost.observe(rows, 1 + 0.1 * (rows - 1))
    assert cost.seconds(13) == pytest.approx(2.2, rel=0.05)
    assert cost.seconds(64) == pytest.approx(7.3, rel=0.1)


def test_cost_of_a_row_count_that_was_seen_is_its_own() -> None:
    cost = RowCost()
    for _ in range(20):
        for rows, seconds in ((1, 1.0), (7, 3.0), (8, 1.6)):
            cost.observe(rows, seconds)
    assert cost.seconds(7) == pytest.approx(3.0, rel=0.1)
    assert cost.seconds(8) == pytest.approx(1.6, rel=0.1)


def test_a_disturbed_measurement_is_soon_forgotten() -> None:
    cost = RowCost()
    for _ in range(5):
        cost.observe(1, 1.0)
    cost.observe(1, 1000.0)
    assert cost.seconds(1) < 1.6
    for _ in range(40):
        cost.observe(1, 1.0)
    assert cost.seconds(1) == pytest.approx(1.0, rel=0.08)


# ---- who takes part --------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "late"), [(0.01, 0.0), (0.5, 0.0), (2.5, 0.0), (0.1, 3.0)])
def test_a_drafter_that_does_not_pay_rests_ever_longer(cost: float, late: float) -> None:
    """And never costs more than a fiftieth of the plain steps it rests for."""
    account, rests, paid = Account(), [], 0.0
    for _ in range(12):
        while not account.resting:
            account.settle(-cost, late)
            paid += cost + late
        rests.append(account.resting)
        account.resting = 0
    assert rests[0] >= FIRST_REST and rests[-1] >= LONGEST_REST
    assert paid <= MOST_LOST * sum(rests)


def test_a_drafter_that_pays_again_is_heard_again() -> None:
    account = Account()
    for _ in range(FIRST_TRIAL - 1):
        account.settle(-0.5)
    assert not account.resting  # the first trial is longer
    account.settle(-0.5)
    assert account.resting and "does not pay here: the last trial cost 0.50" in account.reason()
    account.resting = 0
    for _ in range(30):
        account.settle(1.5)
    assert not account.resting and account.next_rest == FIRST_REST
    assert account.reason() == "saves 1.50 plain steps a step"
    for _ in range(3):
        account.settle(-0.5)
    assert not account.resting  # some bad steps do not undo many good ones


def controller(row_s: float) -> Controller:
    made = Controller(["test"])
    for _ in range(5):
        made.plain_step(1.0, 1.0)
        for rows in (1, 4, 8, 16):
            made.verify.observe(rows, 1 + row_s * (rows - 1))
    return made


def test_the_tree_is_as_large_as_pays() -> None:
    tree = TokenTree(1)
    node = 0
    for depth in range(20):
        node = tree.add(node, depth, guess(0.8))
    sizes = [len(controller(row_s).choose(tree, 64, 0)) for row_s in (0.0, 0.05, 0.3, 0.6, 1.0)]
    assert sizes[0] == 20 and sizes[-1] == 0
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[2] > sizes[3] > 0
    assert controller(0.05).choose(tree, 4, 0) == tree.path(3)  # no room for more rows
    assert controller(1.0).choose(tree, 64, 2) == tree.path(2)  # on trial


def test_a_step_is_plain_until_plain_steps_were_measured() -> None:
    made = Controller(["test"])
    assert made.asked() == []
    for _ in range(TRIAL):
        made.plain_step(1.0, 1.0)
    assert made.asked() == ["test"]


# ---- learning --------------------------------------------------------------------------------


def test_a_correction_makes_what_was_seen_likely_at_such_places_only() -> None:
    random = np.random.default_rng(2)
    correction, logits = HeadCorrection(64), np.zeros((1, 40), np.float32)
    here = correction.features(random.standard_normal((1, 64)).astype(np.float32))
    there = correction.features(random.standard_normal((1, 64)).astype(np.float32))
    for _ in range(12):
        correction.learn(here[0], [(3, 0.6), (4, 0.2)], 9)
    found = correction.apply(logits, here)[0]
    assert found.argmax() == 9 and found[9] > 4 and found[3] < -2
    assert abs(correction.apply(logits, there)[0]).max() < found[9] / 2
    assert not logits.any()  # a copy


def test_a_correction_holds_so_many_tokens_and_forgets_the_oldest() -> None:
    correction = HeadCorrection(4)
    place = correction.features(np.ones((1, 4), np.float32))
    for token in range(MOST_TOKENS + 5):
        correction.learn(place[0], [], token)
    found = correction.apply(np.zeros((1, MOST_TOKENS + 5), np.float32), place)[0]
    assert not found[:5].any() and (found[5:] == 0.5).all()


# ---- lookup ----------------------------------------------------------------------------------


def test_the_trie_knows_what_followed_the_longest_context() -> None:
    trie = NgramTrie()
    trie.extend([1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3])
    found = {token: (share, order) for token, share, order in continuations(trie.cursors, 3)}
    assert found[4] == (0.5, 3)  # after 1 2 3, seen once
    assert found[5][1] == 2 and found[5][0] < 0.5  # after 2 3, seen twice
    assert sum(share for share, _ in found.values()) < 1


def test_a_context_goes_on_through_what_was_only_guessed() -> None:
    trie = NgramTrie()
    trie.extend([1, 2, 3, 4, 5, 6, 0, 1, 2])
    cursors = trie.cursors
    for token in (3, 4, 5, 6):
        assert next(continuations(cursors, 1))[0] == token
        cursors = trie.follow(cursors, token)


def test_texts_do_not_run_into_each_other() -> None:
    trie = NgramTrie()
    trie.extend([1, 2])
    trie.new_text()
    trie.extend([3, 2])
    assert [token for token, _, _ in continuations(trie.cursors, 9)] == []
    trie.new_text()
    trie.extend([2])
    assert [token for token, _, _ in continuations(trie.cursors, 9)] == []


def test_the_trie_is_bounded_and_keeps_what_is_new() -> None:
    trie, random = NgramTrie(most_nodes=2000), np.random.default_rng(1)
    for _ in range(30):
        trie.extend(random.integers(0, 500, 100).tolist())
        assert trie.nodes <= 2000 + ORDER
    trie.extend([7, 8, 9, 7, 8])
    assert next(continuations(trie.cursors, 1))[0] == 9


def test_a_store_keeps_what_was_seen(tmp_path: Path) -> None:
    path = tmp_path / "drafts.npy"
    trie = read_store(path, 100)
    trie.extend([1, 2, 3, 4])
    trie.new_text()
    trie.extend([5, 2, 3, 6])
    write_store(path, trie)
    again = read_store(path, 100)
    again.extend([1, 2, 3])
    assert next(continuations(again.cursors, 1))[0] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["drafts.npy"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array", "not a store of drafts"),
        (b"", "not a store of drafts"),
        (np.array([1, 200], np.int32), "another model; expected token ids below 100"),
        (np.array([1, -2], np.int32), "another model"),
        (np.array([[1]], np.int32), "another model"),
        (np.array([1.5]), "another model"),
    ],
)
def test_a_store_that_is_none_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "drafts.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ModelFileError, match=message):
        read_store(path, 100)
