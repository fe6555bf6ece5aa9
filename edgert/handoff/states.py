"""Hidden rows as bytes of the wire, and the chain hash that names them.

Hidden rows are not anonymous: much of the prompt can be recovered from them. Treat them as plaintext.
"""

import hashlib
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgert.errors import LinkError

Wire = Literal["f32", "f16", "int8"]
WIRES: tuple[Wire, ...] = ("f32", "f16", "int8")

GROUP: Final = 32
"""Values that share a scale, as in the file's matrices: hidden rows have a few large columns, and with
one scale for a whole row these would leave nothing of the others."""
_F16_MAX: Final = 65504.0  # larger values are clipped: as infinities they would spoil the whole row
EMPTY_CHAIN: Final = bytes(16)


def row_bytes(wire: Wire, width: int) -> int:
    """Bytes of one hidden row of `width` values."""
    groups = -(-width // GROUP)
    return {"f32": 4 * width, "f16": 2 * width, "int8": width + 2 * groups}[wire]


def encode(wire: Wire, hidden: NDArray[np.float32]) -> bytes:
    """Rows [T, D] as bytes: `row_bytes` each, one after another. f32 is exact, the others are not."""
    if wire == "f32":
        return hidden.astype("<f4").tobytes()
    if wire == "f16":
        return np.clip(hidden, -_F16_MAX, _F16_MAX).astype("<f2").tobytes()
    count, width = hidden.shape
    groups = _grouped(hidden)
    scales = (np.abs(groups).max(axis=2) / 127).astype("<f2")  # [T, G]
    # The rounded scale is what the other side multiplies with; a group of zeros has the scale 0.
    divisor = np.where(scales == 0, np.float32(1), scales.astype(np.float32))[:, :, None]
    values = np.clip(np.rint(groups / divisor), -127, 127).astype(np.int8).reshape(count, -1)[:, :width]
    return np.concatenate([values.view(np.uint8), scales.view(np.uint8)], axis=1).tobytes()


def decode(wire: Wire, data: bytes, count: int, width: int) -> NDArray[np.float32]:
    """The inverse of `encode`, float32 [T, D]; raises LinkError for a wrong length or values that are
    no numbers."""
    expected = count * row_bytes(wire, width)
    if len(data) != expected:
        raise LinkError(f"found {len(data)} bytes of hidden values, expected {expected} for {count} rows")
    if wire == "f32":
        rows = np.frombuffer(data, "<f4").reshape(count, width).astype(np.float32)
    elif wire == "f16":
        rows = np.frombuffer(data, "<f2").reshape(count, width).astype(np.float32)
    else:
        raw = np.frombuffer(data, np.uint8).reshape(count, -1)
        values = raw[:, :width].view(np.int8).astype(np.float32)
        scales = np.ascontiguousarray(raw[:, width:]).view("<f2").astype(np.float32)
        rows = (_grouped(values) * scales[:, :, None]).reshape(count, -1)[:, :width]
    if not np.isfinite(rows).all():
        raise LinkError("found hidden values that are not numbers, expected finite ones")
    return rows


def _grouped(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[T, D] as [T, G, 32], the last group filled up with zeros."""
    count, width = rows.shape
    padded = np.zeros((count, -(-width // GROUP) * GROUP), np.float32)
    padded[:, :width] = rows
    return padded.reshape(count, -1, GROUP)


class Chain:
    """Chain hashes of the rows of a session: `at(n)` names the first n of them.

    h(0) is 16 zeros, h(n + 1) = BLAKE2b-128(h(n), token n as 4 bytes, hidden row n as sent). Who knows
    that two hashes agree knows that all rows before agree.
    """

    def __init__(self) -> None:
        self._hashes = [EMPTY_CHAIN]

    def __len__(self) -> int:
        return len(self._hashes) - 1

    def at(self, rows: int) -> bytes:
        """The hash of the first `rows` rows."""
        return self._hashes[rows]

    def append(self, token: int, state: bytes) -> None:
        """One more row."""
        self._hashes.append(self.after(self._hashes[-1], token, state))

    def cut(self, rows: int) -> None:
        """Forget all rows but the first `rows`."""
        del self._hashes[rows + 1 :]

    @staticmethod
    def after(before: bytes, token: int, state: bytes) -> bytes:
        """The hash of a row and all before it."""
        return hashlib.blake2b(before + token.to_bytes(4, "little") + state, digest_size=16).digest()
