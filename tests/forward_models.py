"""Small models of every kind, and plain decoding of them, for the tests of the forward path."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numba
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from edgert.config import EngineConfig, KvType, ModelSpec
from edgert.format import declared
from edgert.model.forward import Forward
from edgert.state import Weights
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


def path_to(parents: list[int], row: int) -> list[int]:
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Parents of up to 14 rows: chains, brooms and bushes."""
    count = draw(st.integers(1, 14))
    recent = draw(st.sampled_from([1, 2, 99]))  # 1: one chain
    return [draw(st.integers(max(-1, row - recent), row - 1)) for row in range(count)]


def part_of(name: str, first: int, last: int) -> Weights:
    """The weights of a half of a split model: the same bytes, declared as a part."""
    whole = weights(name)
    spec = replace(whole.spec, part=(first, last))
    return Weights(spec, whole.data, {d.name: whole.tensors[d.name] for d in declared(spec)})
