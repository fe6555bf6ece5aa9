"""Twins of kernels/kv.py, and views of a region that the attention twin uses too."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.kernels.reference.arithmetic import nearest
from edgert.kernels.reference.hadamard import hadamard

KEY_RECORD, VALUE_RECORD = 288, 18


class Region(NamedTuple):
    """Views of one region; see the layout in kernels/kv.py."""

    keys: NDArray[Any]  # [C/16, d, 16]
    values: NDArray[Any]  # [ceil(dv/16), C, 16]
    scales: NDArray[np.float32] | None  # [2, C] for q8


def region_views(kind: int, kv: NDArray[np.uint8], region: int, capacity: int, d: int, dv: int) -> Region:
    """The region that starts at byte `region`, as typed views."""
    item = np.dtype(np.float16 if kind == 0 else np.int8)
    blocks, wide = capacity // 16, -(-dv // 16) * 16
    middle = region + capacity * d * item.itemsize
    end = middle + capacity * wide * item.itemsize
    keys = kv[region:middle].view(item).reshape(blocks, d, 16)
    values = kv[middle:end].view(item).reshape(wide // 16, capacity, 16)
    scales = kv[end : end + capacity * 8].view(np.float32).reshape(2, capacity) if kind == 1 else None
    return Region(keys, values, scales)


def _put(view: Region, slot: int, key: NDArray[Any], value: NDArray[Any]) -> None:
    view.keys[slot // 16, :, slot % 16] = key
    for i in range(0, value.size, 16):
        part = value[i : i + 16]
        view.values[i // 16, slot, : part.size] = part


def store_f16(kv, region, capacity, slot, d, dv, x, key_at, value_at):
    """See kernels/kv.py."""
    view = region_views(0, kv, region, capacity, d, dv)
    with np.errstate(over="ignore"):  # infinite from 65520 on, as in compiled code
        key, value = x[key_at : key_at + d].astype(np.float16), x[value_at : value_at + dv].astype(np.float16)
    _put(view, slot, key, value)


def store_q8(kv, region, capacity, slot, d, dv, x, key_at, value_at):
    """See kernels/kv.py."""
    view = region_views(1, kv, region, capacity, d, dv)
    assert view.scales is not None
    whole = []
    for part, (at, size) in enumerate(((key_at, d), (value_at, dv))):
        row = x[at : at + size]
        largest = np.abs(row).max()
        inverse = np.float32(127) / largest if largest > np.float32(1e-30) else np.float32(0)
        whole.append(nearest(row * inverse).astype(np.int8))
        view.scales[part, slot] = largest / np.float32(127)
    _put(view, slot, *whole)


class Region4(NamedTuple):
    """Views of one q4 region; see the layout in kernels/kv.py."""

    keys: NDArray[np.uint8]  # [C/16, G, 288]
    values: NDArray[np.uint8]  # [Gv, C, 18]


def region_views_q4(kv: NDArray[np.uint8], region: int, capacity: int, d: int, dv: int) -> Region4:
    """The q4 region that starts at byte `region`."""
    groups, slabs = -(-d // 32), -(-dv // 32)
    middle = region + capacity * groups * KEY_RECORD // 16
    end = middle + capacity * slabs * VALUE_RECORD
    keys = kv[region:middle].reshape(capacity // 16, groups, KEY_RECORD)
    return Region4(keys, kv[middle:end].reshape(slabs, capacity, VALUE_RECORD))


def _groups_of_4_bits(row: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """Scales float16 [G] and values + 8 [G, 32] of a row [d]."""
    whole = np.zeros(-(-row.size // 32) * 32, np.float32)
    whole[: row.size] = row
    cut = whole.reshape(-1, 32)
    largest = np.take_along_axis(cut, np.abs(cut).argmax(axis=1)[:, None], axis=1)
    largest[largest == 0] = 0  # never the negative zero
    scales = (largest * np.float32(-0.125)).astype(np.float16)
    used = scales.astype(np.float32)
    inverse = np.where(used != 0, np.float32(1) / np.where(used != 0, used, np.float32(1)), np.float32(0))
    return scales[:, 0], (np.clip(nearest(cut * inverse), -8, 7) + 8).astype(np.uint8)


def store_q4(kv, region, capacity, slot, d, dv, x, key_at, value_at):
    """See kernels/kv.py."""
    view = region_views_q4(kv, region, capacity, d, dv)
    for at, size in ((key_at, d), (value_at, dv)):
        hadamard(x, at, size)
        x[at : at + size] *= np.float32(1) / np.float32(size & -size)
    scales, nibbles = _groups_of_4_bits(x[key_at : key_at + d])
    pairs = nibbles.reshape(-1, 4, 2, 4)
    record = view.keys[slot // 16]
    record[:, :256].reshape(-1, 4, 16, 4)[:, :, slot % 16] = pairs[:, :, 0] | pairs[:, :, 1] << 4
    record[:, 256:].reshape(-1, 16, 2)[:, slot % 16] = scales[:, None].view(np.uint8)
    scales, nibbles = _groups_of_4_bits(x[value_at : value_at + dv])
    view.values[:, slot, :2] = scales[:, None].view(np.uint8)
    view.values[:, slot, 2:] = nibbles[:, :16] | nibbles[:, 16:] << 4


def _move_q4(kv, region, capacity, d, dv, source, target):
    view = region_views_q4(kv, region, capacity, d, dv)
    for part, width in ((slice(0, 256), 4), (slice(256, 288), 2)):
        lanes = view.keys[:, :, part].reshape(*view.keys.shape[:2], -1, 16, width)
        lanes[target // 16, :, :, target % 16] = lanes[source // 16, :, :, source % 16]
        view.keys[:, :, part] = lanes.reshape(*view.keys.shape[:2], -1)
    view.values[:, target] = view.values[:, source]


def move(kind, kv, region, capacity, d, dv, source, target):
    """See kernels/kv.py."""
    if kind == 2:
        _move_q4(kv, region, capacity, d, dv, source, target)
        return
    view = region_views(kind, kv, region, capacity, d, dv)
    view.keys[target // 16, :, target % 16] = view.keys[source // 16, :, source % 16]
    view.values[:, target] = view.values[:, source]
    if view.scales is not None:
        view.scales[:, target] = view.scales[:, source]
