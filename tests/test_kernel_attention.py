"""Attention over the cache of keys and values."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import attention, kv
from edgert.kernels.reference import attention as attention_twin
from tests import kernel_inputs as inputs
from tests.cache_by_hand import (
    F16,
    KINDS,
    Q4,
    halves,
    key_byte,
    key_nibble,
    read_key,
    read_value,
    region_size,
    rotation,
    scale_byte,
    scales_q4,
    value_byte,
    value_nibble,
    width,
)

STALE = np.float32(3e38)
"""What lies in unused places of a scratch array: anything finite, so the worst of that."""


@st.composite
def attention_cases(draw: st.DrawFn, kind: int, calm: bool = False) -> dict[str, Any]:
    """Arguments of attention by name; slots that are not visible hold NaN where they may.

    The rows before `first` in its block of 16 are read with weight 0, so they have to be finite: in
    a cache they always are, because they were computed.
    """
    blocks, d = draw(st.integers(1, 5)), draw(halves)
    dv = draw(st.just(d) | halves)
    capacity, region = blocks * 16, 2 * draw(st.integers(0, 20))
    last = draw(st.integers(1, capacity))
    first = draw(st.integers(0, last - 1) | st.just(0))
    base = draw(st.just(last) | st.integers(0, last))
    # A branch: positions base.. lie in ascending slots from base on.
    free = list(range(base, capacity))
    count = last - base
    chosen = sorted(draw(st.permutations(free))[:count]) if count else []
    path_at = draw(st.integers(0, 3))
    path = np.full(path_at + 64 + capacity, -(2**40), np.int64)
    path[path_at : path_at + count] = chosen
    seed, flavour = draw(inputs.seeds), "plain" if calm else draw(inputs.flavours)
    cache = np.full(region + region_size(kind, capacity, d, dv) + 2, 0xFF, np.uint8)  # NaN as f16 and f32
    needed = set(range(first // 16 * 16, min(last, base))) | set(chosen)
    for slot in needed:
        _fill(kind, cache, region, capacity, d, dv, slot, (seed, slot), flavour)
    q_at, s_at = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    heads = draw(st.sampled_from([1, 2, 4]))
    q = inputs.floats((seed, "q"), flavour, q_at + heads * d, large=1e3)
    wide, groups = width(kind, max(d, dv)), -(-d // 32)
    s = np.full(s_at + heads * (capacity + wide) + 12, STALE)
    x_at = draw(st.integers(0, 2))
    slopes = inputs.uniform((seed, "slopes"), 6)
    sinks = inputs.uniform((seed, "sinks"), 4) * np.float32(4)
    return {
        "kind": kind,
        "heads": heads,
        "kv": cache,
        "region": region,
        "capacity": capacity,
        "d": d,
        "dv": dv,
        "q": q,
        "q_at": q_at,
        "scale": np.float32(d**-0.5),
        "first": first,
        "last": last,
        "base": base,
        "path": path,
        "path_at": path_at,
        "s": s,
        "s_at": s_at,
        "out_at": s_at + heads * capacity + 3,
        "xq": np.zeros((x_at + heads * groups) * 32, np.int8),
        "xs": np.zeros(x_at + heads * groups, np.float32),
        "xn": np.zeros(x_at + heads * groups, np.int32),
        "x_at": x_at,
        "cap": np.float32(draw(st.sampled_from([0.0, 0.0, 5.0]))),
        "w": np.concatenate([slopes, sinks]).view(np.uint8),
        "slopes": draw(st.sampled_from([-1, -1, 8])),
        "sinks": draw(st.sampled_from([-1, -1, 24])),
    }


def outputs_of(case: dict[str, Any]) -> inputs.F32:
    """The outputs [heads, dv] in the scratch array, their padding checked."""
    dv, heads = case["dv"], case["heads"]
    out = case["s"][case["out_at"] :][: heads * width(case["kind"], dv)].reshape(heads, -1)
    assert not out[:, dv:].any()
    return out[:, :dv].copy()


def own(case: dict[str, Any], what: str, head: int) -> int:
    """The byte of one head's slope or sink."""
    return int(case[what] + 4 * head if case[what] >= 0 else -1)


def untouched(case: dict[str, Any]) -> inputs.F32:
    """The scratch array without outputs, the sums behind them, and scores behind the last position."""
    wide = max(
        width(case["kind"], case["dv"]) + 1, width(case["kind"], case["d"])
    )  # queries are rotated there
    end = case["out_at"] + case["heads"] * wide
    s, capacity, kept = case["s"].copy(), case["capacity"], -(-case["last"] // 16) * 16
    for row in range(case["s_at"], case["s_at"] + case["heads"] * capacity, capacity):
        s[row + kept : row + capacity] = STALE
    return np.concatenate([s[: case["out_at"]], s[end:]])


def _fill(
    kind: int,
    cache: inputs.U8,
    region: int,
    capacity: int,
    d: int,
    dv: int,
    slot: int,
    label: Any,
    flavour: str,
) -> None:
    """A random key and value into a slot, padding included, by hand."""
    if kind == Q4:
        _fill_q4(cache, region, capacity, d, dv, slot, label, flavour)
        return
    wide = max(d, width(kind, dv))
    if kind == F16:
        key, value = (inputs.floats((label, n), flavour, wide, large=6e4).astype("<f2") for n in "kv")
    else:
        key, value = (inputs.whole((label, n), -127, 127, wide).astype(np.int8) for n in "kv")
        scales = np.abs(inputs.floats((label, "s"), flavour, 2, large=1e3)) / np.float32(127)
        for part in (0, 1):
            struct.pack_into("<f", cache, scale_byte(region, capacity, d, dv, slot, part), scales[part])
    size = key.itemsize
    for i in range(d):
        at = key_byte(kind, region, d, slot, i)
        cache[at : at + size] = np.frombuffer(key[i].tobytes(), np.uint8)
    for i in range(width(kind, dv)):
        at = value_byte(kind, region, capacity, d, slot, i)
        cache[at : at + size] = np.frombuffer(value[i].tobytes() if i < dv else bytes(size), np.uint8)


def _fill_q4(
    cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int, label: Any, flavour: str
) -> None:
    most = width(Q4, max(d, dv))
    nibbles = inputs.whole((label, "n"), 0, 15, 2, most)
    scales = inputs.floats((label, "s"), flavour, 2, most // 32, large=1e3).astype("<f2")
    for part, size in enumerate((d, dv)):
        wide = width(Q4, size)
        nibbles[part, size:] = 8  # padding: zeros
        for i in range(wide):
            places = key_nibble(region, d, slot, i), value_nibble(region, capacity, d, slot, i)
            byte, shift = places[part]
            cache[byte] = (int(cache[byte]) & 0xF0 >> shift) | int(nibbles[part, i]) << shift
        for g in range(wide // 32):
            at = scales_q4(region, capacity, d, slot, g)[part]
            cache[at : at + 2] = np.frombuffer(scales[part, g].tobytes(), np.uint8)


@pytest.mark.compiled
@KINDS
@inputs.some
@given(data=st.data())
def test_compiled_attention_equals_its_twin(kind: int, data: st.DataObject) -> None:
    ours = data.draw(attention_cases(kind))
    theirs = dict(ours, s=ours["s"].copy(), kv=ours["kv"].copy())
    attention.attention(*ours.values())
    attention_twin.attention(*theirs.values())
    inputs.same(outputs_of(ours), outputs_of(theirs))
    inputs.same(untouched(ours), untouched(theirs))
    inputs.same(ours["kv"], theirs["kv"])


@KINDS
@inputs.some
@given(data=st.data())
def test_attention_is_close_to_exact(kind: int, data: st.DataObject) -> None:
    """Scores below 10 in magnitude, so 2e-5 of the largest value, and in q4 what the query's int8 costs.

    There keys, values and the query are rotated: by hand with H [d, d], and back.
    """
    case = data.draw(attention_cases(kind, calm=True))
    attention.attention(*case.values())
    place = (case["kv"], case["region"], case["capacity"], case["d"], case["dv"])
    d, first, last, base = case["d"], case["first"], case["last"], case["base"]
    slots = [p if p < base else int(case["path"][case["path_at"] + p - base]) for p in range(first, last)]
    keys = [read_key(kind, *place, slot) for slot in slots]
    values = np.array([read_value(kind, *place, slot) for slot in slots])
    h, back = (rotation(size) if kind == Q4 else np.eye(size) for size in (d, case["dv"]))
    for head, found in enumerate(outputs_of(case)):
        q = h @ case["q"][case["q_at"] + head * d :][:d].astype(np.float64)
        scores = np.array([math.fsum(q * key) * float(case["scale"]) for key in keys])
        if case["cap"]:
            scores = case["cap"] * np.tanh(scores / case["cap"])
        if case["slopes"] >= 0:
            slope = float(case["w"].view(np.float32)[case["slopes"] // 4 + head])
            scores = scores - slope * np.arange(len(slots) - 1, -1, -1)
        weights, rest = np.exp(scores - scores.max()), 0.0
        if case["sinks"] >= 0:
            sink = float(case["w"].view(np.float32)[case["sinks"] // 4 + head])
            rest = math.exp(sink - scores.max())
        expected = back @ (weights @ values / (weights.sum() + rest))
        slack = 2e-5
        if kind == Q4:  # an error of e in every score moves a weighted mean by less than 2 e of its range
            steps = np.concatenate([np.full(32, np.abs(q[g : g + 32]).max() / 254) for g in range(0, d, 32)])
            worst = max(float(np.abs(key) @ steps[:d]) for key in keys) * float(case["scale"])
            slack = float(np.abs(back[0]).sum()) * (2e-5 + 2 * math.expm1(1.01 * worst))
        assert np.abs(found - expected).max() <= slack * np.abs(values).max()


@KINDS
@inputs.some
@given(data=st.data())
def test_heads_do_not_depend_on_those_beside_them(kind: int, data: st.DataObject) -> None:
    case = data.draw(attention_cases(kind))
    alone = dict(case, heads=1, s=case["s"].copy())
    attention.attention(*case.values())
    for h, together in enumerate(outputs_of(case)):
        mine = {"q_at": case["q_at"] + h * case["d"]} | {
            what: own(case, what, h) for what in ("slopes", "sinks")
        }
        attention.attention(*dict(alone, **mine).values())
        inputs.same(outputs_of(alone)[0], together)


@KINDS
@inputs.some
@given(data=st.data())
def test_attention_does_not_depend_on_where_a_branch_lies(kind: int, data: st.DataObject) -> None:
    """The same keys by position: as a branch in scattered slots, and as a plain sequence."""
    case = data.draw(attention_cases(kind))
    branch, plain = dict(case, s=case["s"].copy()), dict(case, kv=case["kv"].copy())
    attention.attention(*branch.values())
    for target in range(case["base"], case["last"]):  # ascending: nothing is overwritten before it is moved
        source = int(case["path"][case["path_at"] + target - case["base"]])
        size = case["capacity"], case["d"], case["dv"]
        kv.move(kind, plain["kv"], case["region"], *size, source, target)
    plain["base"] = case["last"]
    if case["first"] // 16 * 16 < case["first"]:  # now in the blocks: finite, as in a real cache
        for slot in range(case["first"] // 16 * 16, case["first"]):
            size = case["capacity"], case["d"], case["dv"]
            _fill(kind, plain["kv"], case["region"], *size, slot, "before", "plain")
    attention.attention(*plain.values())
    inputs.same(outputs_of(branch), outputs_of(plain))
