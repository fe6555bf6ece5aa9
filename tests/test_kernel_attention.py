"""Softmax, the cache of keys and values, and attention over it."""

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import attention, hadamard, kv, softmax
from edgert.kernels.reference import attention as attention_twin
from edgert.kernels.reference import hadamard as hadamard_twin
from edgert.kernels.reference import kv as kv_twin
from edgert.kernels.reference import softmax as softmax_twin
from edgert.kernels.reference.softmax import LOWEST
from tests import kernel_inputs as inputs

F16, Q8, Q4 = 0, 1, 2
STALE = np.float32(3e38)
"""What lies in unused places of a scratch array: anything finite, so the worst of that."""
KINDS = pytest.mark.parametrize("kind", [F16, Q8, Q4], ids=["f16", "q8", "q4"])
STORES = {F16: "store_f16", Q8: "store_q8", Q4: "store_q4"}

# ---- softmax ---------------------------------------------------------------------------------


@st.composite
def softmax_cases(draw: st.DrawFn) -> list[Any]:
    """Scores first..last-1, with stale numbers around them."""
    first = draw(st.integers(0, 70))
    last = first + draw(st.integers(1, 70))
    seed, at = draw(inputs.seeds), draw(st.integers(0, 5))
    s = np.full(at + 150 + 16, STALE)
    flavour, large = draw(inputs.flavours), draw(st.sampled_from([30.0, 1e6, 1e30]))
    s[at + first : at + last] = inputs.floats(seed, flavour, last - first, large=large)
    sink = np.float32(draw(st.just(LOWEST) | st.sampled_from([-5.0, 0.5, large])))
    return [s, at, first, last, sink]


@pytest.mark.compiled
@inputs.some
@given(softmax_cases())
def test_compiled_softmax_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(softmax.softmax, softmax_twin.softmax, *case)


@inputs.some
@given(softmax_cases())
def test_softmax_is_close_to_exact(case: list[Any]) -> None:
    """exp to 3e-7 and its argument to one rounding; what is below e**-87 may be e**-87."""
    s, at, first, last, sink = case
    before = s.copy()
    total = softmax.softmax(*case)
    scores = before[at + first : at + last].astype(np.float64)
    top = max(scores.max(), float(sink))
    differences = scores - top
    expected = np.exp(differences)
    slack = expected * (3e-7 + np.minimum(-differences, 90) * 2.0**-23) + 2e-38
    assert (np.abs(s[at + first : at + last] - expected) <= slack).all()
    assert math.isclose(total, math.fsum(expected) + math.exp(float(sink) - top), rel_tol=2e-5)
    begin, end = first // 16 * 16, -(-last // 16) * 16
    assert not s[at + begin : at + first].any()
    assert not s[at + last : at + end].any()
    before[at + begin : at + end] = s[at + begin : at + end]
    inputs.same(s, before)


# ---- the cache, by hand ----------------------------------------------------------------------


def key_byte(kind: int, region: int, d: int, slot: int, i: int) -> int:
    return region + ((slot // 16 * d + i) * 16 + slot % 16) * (2 if kind == F16 else 1)


def value_byte(kind: int, region: int, capacity: int, d: int, slot: int, i: int) -> int:
    size = 2 if kind == F16 else 1
    return region + capacity * d * size + ((i // 16 * capacity + slot) * 16 + i % 16) * size


def scale_byte(region: int, capacity: int, d: int, dv: int, slot: int, part: int) -> int:
    wide = -(-dv // 16) * 16
    return region + capacity * (d + wide) + (part * capacity + slot) * 4


def key_nibble(region: int, d: int, slot: int, i: int) -> tuple[int, int]:
    """The byte of a q4 key's dimension i, and the shift of its nibble."""
    record = region + (slot // 16 * -(-d // 32) + i // 32) * 288
    return record + i % 32 // 8 * 64 + slot % 16 * 4 + i % 4, i % 8 // 4 * 4


def value_nibble(region: int, capacity: int, d: int, slot: int, i: int) -> tuple[int, int]:
    """The byte of a q4 value's dimension i, and the shift of its nibble."""
    groups = -(-d // 32)
    record = region + capacity * groups * 18 + (i // 32 * capacity + slot) * 18
    return record + 2 + i % 16, i % 32 // 16 * 4


def scales_q4(region: int, capacity: int, d: int, slot: int, group: int) -> tuple[int, int]:
    """The bytes of the float16 scales of a q4 key's and value's group."""
    groups = -(-d // 32)
    key = region + (slot // 16 * groups + group) * 288 + 256 + slot % 16 * 2
    return key, region + capacity * groups * 18 + (group * capacity + slot) * 18


def read_q4(
    part: int, cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int
) -> inputs.F64:
    """The key (part 0) or value (part 1) in a slot, as it is stored: rotated."""
    row = []
    for i in range((d, dv)[part]):
        places = key_nibble(region, d, slot, i), value_nibble(region, capacity, d, slot, i)
        byte, shift = places[part]
        scale = struct.unpack_from("<e", cache, scales_q4(region, capacity, d, slot, i // 32)[part])[0]
        row.append(scale * ((int(cache[byte]) >> shift & 15) - 8))
    return np.array(row)


def rotation(d: int) -> inputs.F64:
    """H [d, d]: Sylvester's matrix of the largest power of two in d, along the diagonal."""
    h = np.ones((1, 1))
    while d % (2 * len(h)) == 0:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(d // len(h)), h)


def read_key(
    kind: int, cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int
) -> inputs.F64:
    if kind == Q4:
        return read_q4(0, cache, region, capacity, d, dv, slot)
    if kind == F16:
        return np.array(
            [struct.unpack_from("<e", cache, key_byte(kind, region, d, slot, i))[0] for i in range(d)]
        )
    scale = struct.unpack_from("<f", cache, scale_byte(region, capacity, d, dv, slot, 0))[0]
    return scale * np.array(
        [struct.unpack_from("<b", cache, key_byte(kind, region, d, slot, i))[0] for i in range(d)]
    )


def read_value(
    kind: int, cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int
) -> inputs.F64:
    if kind == Q4:
        return read_q4(1, cache, region, capacity, d, dv, slot)
    places = [value_byte(kind, region, capacity, d, slot, i) for i in range(dv)]
    if kind == F16:
        return np.array([struct.unpack_from("<e", cache, place)[0] for place in places])
    scale = struct.unpack_from("<f", cache, scale_byte(region, capacity, d, dv, slot, 1))[0]
    return scale * np.array([struct.unpack_from("<b", cache, place)[0] for place in places])


def region_size(kind: int, capacity: int, d: int, dv: int) -> int:
    if kind == Q4:
        return capacity * (-(-d // 32) + -(-dv // 32)) * 18
    numbers = capacity * (d + -(-dv // 16) * 16)
    return numbers * 2 if kind == F16 else numbers + capacity * 8


halves = st.integers(1, 40).map(lambda half: 2 * half)
sizes = st.tuples(st.integers(1, 4), halves, halves)
"""Blocks of positions, dimensions of a key and of a value."""


@KINDS
@given(sizes)
@inputs.few
def test_regions_have_the_size_of_their_layout(kind: int, size: tuple[int, int, int]) -> None:
    place = size[0] * 16, *size[1:]
    assert kv.region_bytes(kind, *place) == region_size(kind, *place)


@st.composite
def store_cases(draw: st.DrawFn) -> list[Any]:
    """Arguments of store_f16 and store_q8; magnitudes that float16 holds."""
    blocks, d, dv = draw(sizes)
    capacity, region = blocks * 16, 2 * draw(st.integers(0, 20))
    seed, slot = draw(inputs.seeds), draw(st.integers(0, capacity - 1))
    cache = inputs.raw((seed, "kv"), region + region_size(F16, capacity, d, dv) + 8)
    x = inputs.floats((seed, "x"), draw(inputs.flavours), d + dv + 20, large=6e4)
    return [cache, region, capacity, slot, d, dv, x, draw(st.integers(0, 9)), d + 11]


@pytest.mark.compiled
@KINDS
@inputs.some
@given(case=store_cases())
def test_compiled_stores_equal_their_twins(kind: int, case: list[Any]) -> None:
    inputs.agree(getattr(kv, STORES[kind]), getattr(kv_twin, STORES[kind]), *case)


@KINDS
@inputs.some
@given(case=store_cases())
def test_stores_write_one_position_and_nothing_else(kind: int, case: list[Any]) -> None:
    cache, region, capacity, slot, d, dv, x, key_at, value_at = case
    before, given = cache.copy(), x.astype(np.float64)
    getattr(kv, STORES[kind])(*case)
    size = 2 if kind == F16 else 1
    places = [key_byte(kind, region, d, slot, i) for i in range(d)]
    places += [value_byte(kind, region, capacity, d, slot, i) for i in range(dv)]
    touched = {place + b for place in places for b in range(size)}
    if kind == Q8:
        touched |= {scale_byte(region, capacity, d, dv, slot, part) + b for part in (0, 1) for b in range(4)}
    if kind == Q4:
        of_key, of_value = range(width(Q4, d)), range(width(Q4, dv))
        touched = {key_nibble(region, d, slot, i)[0] for i in of_key}
        touched |= {value_nibble(region, capacity, d, slot, i)[0] for i in of_value}
        for part, row in enumerate((of_key, of_value)):
            scales = [scales_q4(region, capacity, d, slot, g)[part] for g in range(len(row) // 32)]
            touched |= {at + b for at in scales for b in (0, 1)}
    others = np.ones(cache.size, bool)
    others[list(touched)] = False
    np.testing.assert_array_equal(cache[others], before[others])
    for read, at, count in ((read_key, key_at, d), (read_value, value_at, dv)):
        row, found = given[at : at + count], read(kind, cache, region, capacity, d, dv, slot)
        if kind == F16:
            np.testing.assert_array_equal(found, row.astype(np.float16).astype(np.float64))
        elif kind == Q8:
            largest = np.abs(row).max()
            assert (np.abs(found - row) <= largest * (0.5 / 127 + 2e-6) + 1e-30).all()
        else:
            h = rotation(count)
            rotated = h @ row / (h @ h)[0, 0]
            size = np.abs(h) @ np.abs(row) / (h @ h)[0, 0]  # of what roundings are relative to
            for g in range(0, count, 32):
                part = rotated[g : g + 32]
                # A step is an eighth of the largest; the scale is a float16: 11 bits, or units of 2**-25.
                largest = np.abs(part).max()
                slack = largest * 2**-7 + 2e-6 * size[g : g + 32].max() + 16 * 2.0**-25
                error = np.abs(found[g : g + 32] - part)
                assert (error <= largest / 8 + slack).all()  # -8..7 cuts one end off
                assert (error[np.abs(part) <= largest * 7 / 8] <= largest / 16 + slack).all()


@st.composite
def move_cases(draw: st.DrawFn) -> list[Any]:
    blocks, d, dv = draw(sizes)
    capacity, region, seed = blocks * 16, 2 * draw(st.integers(0, 20)), draw(inputs.seeds)
    slots = st.integers(0, capacity - 1)
    cache = inputs.raw(seed, region + region_size(F16, capacity, d, dv) + 8)
    cache[1::2] &= 0x3B  # no NaN among the floats: views of it may be copied
    return [cache, region, capacity, d, dv, draw(slots), draw(slots)]


@pytest.mark.compiled
@KINDS
@inputs.some
@given(case=move_cases())
def test_compiled_moves_equal_their_twins(kind: int, case: list[Any]) -> None:
    inputs.agree(kv.move, kv_twin.move, kind, *case)


@KINDS
@inputs.some
@given(case=move_cases())
def test_moves_copy_one_position(kind: int, case: list[Any]) -> None:
    cache, region, capacity, d, dv, source, target = case
    before = cache.copy()
    kv.move(kind, *case)
    end = region + region_size(kind, capacity, d, dv)
    for slot in range(capacity):
        origin = source if slot == target else slot
        for read in (read_key, read_value):
            found = read(kind, cache, region, capacity, d, dv, slot)
            np.testing.assert_array_equal(found, read(kind, before, region, capacity, d, dv, origin))
    np.testing.assert_array_equal(cache[:region], before[:region])
    np.testing.assert_array_equal(cache[end:], before[end:])


@pytest.mark.compiled
@inputs.some
@given(inputs.seeds, inputs.flavours, st.integers(1, 70), st.integers(0, 5))
def test_compiled_rotations_equal_their_twin(seed: int, flavour: str, half: int, at: int) -> None:
    x = inputs.floats(seed, flavour, at + 2 * half + 3)
    inputs.agree(hadamard.hadamard, hadamard_twin.hadamard, x, at, 2 * half)


@inputs.some
@given(inputs.seeds, inputs.flavours, st.integers(1, 70), st.integers(0, 5))
def test_rotations_are_close_to_exact_and_touch_nothing_else(
    seed: int, flavour: str, half: int, at: int
) -> None:
    d = 2 * half
    x = inputs.floats(seed, flavour, at + d + 3)
    before = x.copy()
    hadamard.hadamard(x, at, d)
    h, row = rotation(d), before[at : at + d].astype(np.float64)
    assert (np.abs(x[at : at + d] - h @ row) <= 7 * 2.0**-24 * (np.abs(h) @ np.abs(row))).all()
    x[at : at + d] = before[at : at + d]
    inputs.same(x, before)


# ---- attention -------------------------------------------------------------------------------


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


def width(kind: int, d: int) -> int:
    """Length of a padded output."""
    unit = 32 if kind == Q4 else 16
    return -(-d // unit) * unit


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
