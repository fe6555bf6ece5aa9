"""Twins of kernels/kv.py, and views of a region that the attention twin uses too."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.kernels.reference.arithmetic import nearest


class Region(NamedTuple):
    """Views of one region; see the layout in kernels/kv.py."""

    keys: NDArray[Any]  # [C/16, d, 16]
    values: NDArray[Any]  # [ceil(d/16), C, 16]
    scales: NDArray[np.float32] | None  # [2, C] for q8


def region_views(kind: int, kv: NDArray[np.uint8], region: int, capacity: int, d: int) -> Region:
    """The region that starts at byte `region`, as typed views."""
    item = np.dtype(np.float16 if kind == 0 else np.int8)
    blocks, wide = capacity // 16, -(-d // 16) * 16
    middle = region + capacity * d * item.itemsize
    end = middle + capacity * wide * item.itemsize
    keys = kv[region:middle].view(item).reshape(blocks, d, 16)
    values = kv[middle:end].view(item).reshape(wide // 16, capacity, 16)
    scales = kv[end : end + capacity * 8].view(np.float32).reshape(2, capacity) if kind == 1 else None
    return Region(keys, values, scales)


def _put(view: Region, slot: int, d: int, key: NDArray[Any], value: NDArray[Any]) -> None:
    view.keys[slot // 16, :, slot % 16] = key
    for i in range(0, d, 16):
        part = value[i : i + 16]
        view.values[i // 16, slot, : part.size] = part


def store_f16(kv, region, capacity, slot, d, x, key_at, value_at):
    """See kernels/kv.py."""
    view = region_views(0, kv, region, capacity, d)
    with np.errstate(over="ignore"):  # infinite from 65520 on, as in compiled code
        key, value = (x[at : at + d].astype(np.float16) for at in (key_at, value_at))
    _put(view, slot, d, key, value)


def store_q8(kv, region, capacity, slot, d, x, key_at, value_at):
    """See kernels/kv.py."""
    view = region_views(1, kv, region, capacity, d)
    assert view.scales is not None
    whole = []
    for part, at in enumerate((key_at, value_at)):
        row = x[at : at + d]
        largest = np.abs(row).max()
        inverse = np.float32(127) / largest if largest > np.float32(1e-30) else np.float32(0)
        whole.append(nearest(row * inverse).astype(np.int8))
        view.scales[part, slot] = largest / np.float32(127)
    _put(view, slot, d, *whole)


def move(kind, kv, region, capacity, d, source, target):
    """See kernels/kv.py."""
    view = region_views(kind, kv, region, capacity, d)
    view.keys[target // 16, :, target % 16] = view.keys[source // 16, :, source % 16]
    view.values[:, target] = view.values[:, source]
    if view.scales is not None:
        view.scales[:, target] = view.scales[:, source]
