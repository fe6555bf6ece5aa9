"""Keys and values go to their places in the cache, and move there."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import hadamard, kv
from edgert.kernels.reference import hadamard as hadamard_twin
from edgert.kernels.reference import kv as kv_twin
from tests import kernel_inputs as inputs
from tests.cache_by_hand import (
    F16,
    KINDS,
    Q4,
    Q8,
    key_byte,
    key_nibble,
    read_key,
    read_value,
    region_size,
    rotation,
    scale_byte,
    scales_q4,
    sizes,
    value_byte,
    value_nibble,
    width,
)

STORES = {F16: "store_f16", Q8: "store_q8", Q4: "store_q4"}


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
