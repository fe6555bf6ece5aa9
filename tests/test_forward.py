"""The one forward path: however rows are grouped, whoever computes them, the bits are the same."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.config import EngineConfig, KvType, ModelSpec
from edgert.errors import ContextLengthError, UsageError
from edgert.format import declared
from edgert.model.forward import Forward
from edgert.state import MAX_OUTPUTS, Weights
from tests import kernel_inputs as inputs

CONTEXT = 80
CHUNK = 64

# Without the JIT a row takes milliseconds: short texts, few models, few examples.
TWINS: bool = numba.config.DISABLE_JIT
LENGTH = 23 if TWINS else 60
few = settings(deadline=None, max_examples=2 if TWINS else 12, derandomize=True)

# The query heads that share a key head are 4, 5, 3, 7 and 1: attention takes them in fours, twos and ones.
GQA = ModelSpec("llama", 2, 64, 8, 2, 16, 96, 96, CONTEXT, 1e-5)
# Sizes that fill no block, one head of keys, the embedding as output.
MQA_ODD = ModelSpec("mistral", 2, 40, 5, 1, 24, 172, 99, CONTEXT, 1e-5, "relu2", tied_embeddings=True)
# Every bias, norms of heads, and windows: shorter than a block, none, and longer.
RICH = ModelSpec(
    "qwen3", 3, 48, 6, 2, 12, 80, 67, CONTEXT, 1e-6, "gelu_tanh", False, True, True, True, True, (5, 0, 20)
)
SMALL_HEADS = ModelSpec("llama", 2, 32, 7, 1, 2, 33, 50, CONTEXT, 1e-5, "relu", windows=(1, 3))
# Heads after the first and the second of three layers.
EXITS = ModelSpec("llama", 3, 40, 4, 2, 10, 72, 83, CONTEXT, 1e-5, "relu", exits=(1, 2))
EXITS_TIED = replace(EXITS, width=64, tied_embeddings=True, exits=(2,))
MHA = ModelSpec("qwen2", 2, 48, 4, 4, 12, 64, 70, CONTEXT, 1e-6, qkv_bias=True)
# Experts: a shared one beside them, a dense layer between; sizes that fill no block.
EXPERTS = ModelSpec(
    *("qwen2_moe", 3, 48, 6, 2, 12, 80, 67, CONTEXT, 1e-6),
    qkv_bias=True,
    experts=7,
    active_experts=3,
    expert_width=40,
    shared_width=56,
    dense_layers=(1,),
)
ONE_EXPERT = ModelSpec(
    *("olmoe", 2, 40, 4, 2, 12, 80, 67, CONTEXT, 1e-5, "relu"),
    joint_qk_norm=True,
    experts=18,
    active_experts=1,
    expert_width=44,
    normalized_routing=True,
)


@dataclass(frozen=True)
class Case:
    spec: ModelSpec
    quant: str  # of all matrices; "mixed" takes turns
    kv: KvType


CASES = {
    "gqa-q4-f16": Case(GQA, "q4", "f16"),
    "rich-q8-q8": Case(RICH, "q8", "q8"),
    "odd-f32-f16": Case(MQA_ODD, "f32", "f16"),
    "rich-f16-f16": Case(RICH, "f16", "f16"),
    "odd-mixed-q8": Case(MQA_ODD, "mixed", "q8"),
    "small-mixed-f16": Case(SMALL_HEADS, "mixed", "f16"),
    "gqa-q8-q8": Case(GQA, "q8", "q8"),
    "gqa-q4m-f16": Case(GQA, "q4m", "f16"),
    "gqa-q3-f16": Case(GQA, "q3", "f16"),
    "gqa-q4s-f16": Case(GQA, "q4s", "f16"),
    "rich-q2-q8": Case(RICH, "q2", "q8"),
    "rich-q4-q8": Case(RICH, "q4", "q8"),
    "rich-q4-q4": Case(RICH, "q4", "q4"),
    "odd-mixed-q4": Case(MQA_ODD, "mixed", "q4"),
    "mha-q8-f16": Case(MHA, "q8", "f16"),
    "exits-q4-f16": Case(EXITS, "q4", "f16"),
    "exits-mixed-q8": Case(EXITS_TIED, "mixed", "q8"),
    "exits-f32-f16": Case(EXITS, "f32", "f16"),
    "exits-f16-f16": Case(EXITS_TIED, "f16", "f16"),
    "gqa-f32-f16": Case(GQA, "f32", "f16"),
    "rich-f32-f16": Case(RICH, "f32", "f16"),
    "small-f32-f16": Case(SMALL_HEADS, "f32", "f16"),
    "experts-mixed-f16": Case(EXPERTS, "mixed", "f16"),
    "experts-q4-q8": Case(EXPERTS, "q4", "q8"),
    "experts-f32-f16": Case(EXPERTS, "f32", "f16"),
    "one-expert-q8-f16": Case(ONE_EXPERT, "q8", "f16"),
    "one-expert-f32-f16": Case(ONE_EXPERT, "f32", "f16"),
}
EVERY = pytest.mark.parametrize(
    "name", ["rich-q4-q8", "odd-mixed-q4", "experts-mixed-f16"] if TWINS else list(CASES)
)
TWO = pytest.mark.parametrize(
    "name", ["rich-q8-q8"] if TWINS else ["gqa-q4-f16", "rich-q8-q8", "experts-q4-q8"]
)


@cache
def weights(name: str) -> Weights:
    case = CASES[name]
    takes_turns = ("q4", "f16", "q3", "q8", "f32", "q2")

    def quant_of(tensor: str) -> str:
        return case.quant if case.quant != "mixed" else takes_turns[sum(tensor.encode()) % 6]

    return inputs.tiny_weights(case.spec, quant_of, name)


@contextmanager
def forward(name: str, threads: int = 1, chunk: int = CHUNK) -> Iterator[Forward]:
    made = Forward(weights(name), EngineConfig(threads, CONTEXT, chunk, CASES[name].kv))
    try:
        yield made
    finally:
        made.close()


def tokens_of(name: str, seed: int, count: int) -> list[int]:
    return [int(t) for t in inputs.whole((seed, "tokens"), 0, CASES[name].spec.vocab - 1, count)]


def feed(model: Forward, tokens: Sequence[int], pieces: Sequence[int]) -> inputs.F32:
    """Logits after every token, run in pieces of these sizes."""
    rows, at = [], 0
    for size in pieces:
        rows.append(model.run(tokens[at : at + size], outputs=range(size)).copy())
        at += size
    assert at == len(tokens)
    return np.concatenate(rows)


@cache
def plain(name: str, seed: int, count: int) -> tuple[inputs.F32, inputs.U8]:
    """Logits of the plainest way, one token at a time by one thread; and the cache after it."""
    with forward(name, chunk=1) as model:
        return feed(model, tokens_of(name, seed, count), [1] * count), model.cache.data.copy()


@st.composite
def cuts(draw: st.DrawFn, count: int) -> list[int]:
    pieces: list[int] = []
    while sum(pieces) < count:
        pieces.append(draw(st.integers(1, min(CHUNK, count - sum(pieces)))))
    return pieces


# ---- (i) chunks ------------------------------------------------------------------------------


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


# ---- (ii) threads ----------------------------------------------------------------------------


@pytest.mark.compiled
@EVERY
@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(name: str, threads: int) -> None:
    expected, cached = plain(name, 1, 60)
    for pieces in ([60], [1] * 12 + [48], [17, 2, 41]):
        with forward(name, threads) as model:
            inputs.same(feed(model, tokens_of(name, 1, 60), pieces), expected)
            inputs.same(model.cache.data, cached)


# ---- (iii) token trees -----------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Parents of up to 14 rows: chains, brooms and bushes."""
    count = draw(st.integers(1, 14))
    recent = draw(st.sampled_from([1, 2, 99]))  # 1: one chain
    return [draw(st.integers(max(-1, row - recent), row - 1)) for row in range(count)]


def path_to(parents: list[int], row: int) -> list[int]:
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


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


# ---- (iv) rewinding --------------------------------------------------------------------------


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


# ---- (v) layer ranges ------------------------------------------------------------------------


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


# ---- (vi) several sequences ------------------------------------------------------------------


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


# ---- (vii) a file of some layers -------------------------------------------------------------


def part_of(name: str, first: int, last: int) -> Weights:
    """The weights of a half of a split model: the same bytes, declared as a part."""
    whole = weights(name)
    spec = replace(whole.spec, part=(first, last))
    return Weights(spec, whole.data, {d.name: whole.tensors[d.name] for d in declared(spec)})


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


# ---- (viii) exits ----------------------------------------------------------------------------

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


# ---- limits ----------------------------------------------------------------------------------


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


# ---- (ix) against a model written by hand ----------------------------------------------------


class ByHand:
    """The Llama block in float64, from the paper and the meaning of the spec's fields."""

    def __init__(self, name: str) -> None:
        self.weights, self.spec = weights(name), CASES[name].spec

    def matrix(self, name: str) -> inputs.F64:
        tensor = self.weights.tensors[name]
        rows, columns = tensor.shape
        groups = -(-columns // 32)
        return inputs.stored_matrix(tensor.quant, self.weights.data, tensor.offset, groups, rows, columns)

    def vector(self, name: str) -> inputs.F64:
        tensor = self.weights.tensors[name]
        return np.frombuffer(
            self.weights.data[tensor.offset : tensor.offset + tensor.nbytes].tobytes(), "<f4"
        ).astype(np.float64)

    def linear(self, name: str, x: inputs.F64) -> inputs.F64:
        y = x @ self.matrix(name).T
        bias = f"{name}_bias"
        return y + self.vector(bias) if bias in self.weights.tensors else y

    def norm(self, gain: str, x: inputs.F64) -> inputs.F64:
        mean = (x * x).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.spec.norm_eps) * self.vector(gain)

    def rotate(self, x: inputs.F64) -> inputs.F64:
        """x [T, heads, d]: the pair (i, i + d/2) turned by position * frequency[i]."""
        half = self.spec.head_dim // 2
        angle = np.arange(len(x))[:, None, None] * self.vector("rope_frequencies")
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def activate(self, x: inputs.F64) -> inputs.F64:
        positive = np.maximum(x, 0)
        return {
            "silu": lambda: x / (1 + np.exp(-x)),
            "relu": lambda: positive,
            "relu2": lambda: positive**2,
            "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        }[self.spec.activation]()

    def attention(self, layer: int, x: inputs.F64) -> inputs.F64:
        spec, name, count = self.spec, f"layers.{layer}", len(x)
        q = self.linear(f"{name}.q", x).reshape(count, spec.heads, spec.head_dim)
        k = self.linear(f"{name}.k", x).reshape(count, spec.kv_heads, spec.head_dim)
        v = self.linear(f"{name}.v", x).reshape(count, spec.kv_heads, spec.head_dim)
        if spec.joint_qk_norm:
            q = self.norm(f"{name}.q_norm", q.reshape(count, -1)).reshape(q.shape)
            k = self.norm(f"{name}.k_norm", k.reshape(count, -1)).reshape(k.shape)
        if spec.qk_norm:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        # The cache holds float16.
        q, k = self.rotate(q), self.rotate(k).astype(np.float16).astype(np.float64)
        v = v.astype(np.float16).astype(np.float64)
        out = np.zeros_like(q)
        window = spec.windows[layer] if spec.windows else 0
        for t in range(count):
            start = max(0, t + 1 - window) if window else 0
            for h in range(spec.heads):
                shared = h * spec.kv_heads // spec.heads
                scores = k[start : t + 1, shared] @ q[t, h] / math.sqrt(spec.head_dim)
                p = np.exp(scores - scores.max())
                out[t, h] = p @ v[start : t + 1, shared] / p.sum()
        return self.linear(f"{name}.o", out.reshape(count, -1))

    def experts(self, name: str, x: inputs.F64) -> inputs.F64:
        spec = self.spec
        scores = np.exp(self.linear(f"{name}.router", x))
        scores /= scores.sum(axis=1, keepdims=True)
        y = np.zeros_like(x)
        for t, row in enumerate(scores):
            best = sorted(range(spec.experts), key=lambda e: -row[e])[: spec.active_experts]
            total = sum(row[e] for e in best) if spec.normalized_routing else 1.0
            for e in best:
                y[t] += row[e] / total * self.expert(f"{name}.experts.{e}", x[t])
        if spec.shared_width:
            gate = self.activate(self.linear(f"{name}.shared_gate", x)) * self.linear(f"{name}.shared_up", x)
            weight = 1 / (1 + np.exp(-self.linear(f"{name}.shared_router", x)))
            y += weight * self.linear(f"{name}.shared_down", gate)
        return y

    def expert(self, name: str, x: inputs.F64) -> inputs.F64:
        """One row through the three matrices that lie in one tensor."""
        tensor, at, found = self.weights.tensors[name], self.weights.tensors[name].offset, []
        _, inner, width = tensor.shape
        for rows, columns in ((inner, width), (inner, width), (width, inner)):
            blocks, groups = -(-rows // 16), -(-columns // 32)
            found.append(inputs.stored_matrix(tensor.quant, self.weights.data, at, groups, rows, columns))
            at += blocks * groups * inputs.RECORD[tensor.quant]
        gate, up, down = found
        result: inputs.F64 = down @ (self.activate(gate @ x) * (up @ x))
        return result

    def logits(self, tokens: list[int], layers: int | None = None) -> inputs.F64:
        """Of the model, or of the exit after so many layers."""
        x = self.matrix("token_embedding")[tokens]
        for layer in range(self.spec.layers if layers is None else layers):
            name = f"layers.{layer}"
            x = x + self.attention(layer, self.norm(f"{name}.attention_norm", x))
            normed = self.norm(f"{name}.ffn_norm", x)
            if f"{name}.router" in self.weights.tensors:
                x = x + self.experts(name, normed)
                continue
            gate = self.activate(self.linear(f"{name}.gate", normed))
            x = x + self.linear(f"{name}.down", gate * self.linear(f"{name}.up", normed))
        output = "token_embedding" if self.spec.tied_embeddings else "output"
        if layers is None:
            return self.norm("output_norm", x) @ self.matrix(output).T
        n = self.norm(f"exits.{layers}.norm", x)
        z = n + n @ self.matrix(f"exits.{layers}.matrix").T
        return self.norm(f"exits.{layers}.output_norm", z) @ self.matrix(output).T


@pytest.mark.parametrize(
    "name",
    [
        *("gqa-f32-f16", "odd-f32-f16", "rich-f32-f16", "small-f32-f16", "rich-f16-f16"),
        *("experts-f32-f16", "one-expert-f32-f16"),
    ],
)
def test_logits_are_those_of_a_model_written_by_hand(name: str) -> None:
    tokens = tokens_of(name, 3, LENGTH)
    expected = ByHand(name).logits(tokens)
    with forward(name) as model:
        found = feed(model, tokens, [LENGTH - 7, 7])
    assert np.abs(expected).max() > 0.1  # not a model that says nothing
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["exits-f32-f16", "exits-f16-f16"])
def test_exits_are_those_of_a_lens_written_by_hand(name: str) -> None:
    tokens = tokens_of(name, 3, LENGTH)
    for layer in CASES[name].spec.exits:
        expected = ByHand(name).logits(tokens, layer)
        with forward(name) as model:
            found = model.run(tokens, layers=(0, layer), outputs=range(LENGTH)).copy()
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_the_tiny_models_are_not_degenerate() -> None:
    """Logits differ between tokens and depend on the first token: attention looks back."""
    for name in ("gqa-q4-f16", "odd-f32-f16"):
        tokens = tokens_of(name, 1, 12)
        with forward(name) as model:
            first = feed(model, tokens, [12])
            model.cache.rewind(0)
            second = feed(model, [(tokens[0] + 1) % 90, *tokens[1:]], [12])
        assert np.abs(first[-1] - second[-1]).max() > 1e-4
        assert np.ptp(first[-1]) > 0.1
