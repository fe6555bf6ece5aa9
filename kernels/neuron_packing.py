"""The `neurons32` byte layout of a feed-forward's up and down, neuron by neuron (PowerInfer-2, section 4.2).

Neuron n is row n of up [F, D] and column n of down [D, F]. Where few neurons fire, only theirs are read: so
the two lie together, each in one piece. A cluster is the 32 neurons that are one group of down:

    scales of down      per slice 128 float16: of each output d for these 32 neurons
    32 x a neuron       its row of up, then its column of down

    row of up           per span of 16 groups of D one record, as many bytes as one of rows16 and in the
                        same order, the 16 groups of one row in the place of one group of 16 rows
    column of down      per slice of 128 outputs 64 bytes of q4 (outputs 0 .. 63 in the low nibbles,
                        64 .. 127 in the high ones, each nibble the value + 8), or twice 64 int8 of q8;
                        byte 16a + 4b + c of 64 is output 16b + 4a + c, so that zipping four neurons gives
                        their outputs in order

D is padded with zeros to whole spans and slices, F to whole clusters. As in rows16 one lane is one sum of
products: of a group in a row of up, of an output in a column of down.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.kernels.packing import BLOCK, GROUP, RECORD_BYTES, unpack_scales, unpack_values

CLUSTER = 32
"""Neurons of a cluster: the group of down that shares its scales."""
SPAN = 16
"""Groups of a record."""
SLICE = 128
"""Outputs that the columns of one register of q4 hold."""

QUANTS = ("q8", "q4")
"""Precisions that have this layout: those whose groups are sums of whole numbers."""

_ORDER = np.arange(64).reshape(4, 4, 4).transpose(1, 0, 2).reshape(64)
"""The output of each byte of 64."""


class NeuronShape(NamedTuple):
    """Sizes in bytes of the parts of neurons of width D."""

    spans: int  # records of a row of up
    slices: int  # of a column of down
    scales: int  # of down, at the start of a cluster
    up: int  # a neuron's row of up
    down: int  # a neuron's column of down
    cluster: int  # all of it

    @classmethod
    def of(cls, quant: str, width: int) -> "NeuronShape":
        """For neurons of `width` inputs and as many outputs."""
        spans, slices = -(-width // (SPAN * GROUP)), -(-width // SLICE)
        scales, up = slices * SLICE * 2, spans * RECORD_BYTES[quant]
        down = slices * (SLICE // 2 if quant == "q4" else SLICE)
        return cls(spans, slices, scales, up, down, scales + CLUSTER * (up + down))


def stored_bytes(quant: str, neurons: int, width: int) -> int:
    """Bytes of the up and down of F neurons of width D."""
    return -(-neurons // CLUSTER) * NeuronShape.of(quant, width).cluster


def rows_bytes(quant: str, rows: int, width: int) -> int:
    """Bytes of the `rows1` layout: rows one by one, each as a row of up, padded to whole blocks of 16."""
    return -(-rows // BLOCK) * BLOCK * NeuronShape.of(quant, width).up


def pack_rows(quant: str, values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Rows as `pack_up`, and rows of zeros up to a whole block of 16."""
    rows = pack_up(quant, values, scales)
    return np.concatenate([rows, np.zeros((-len(rows) % BLOCK, rows.shape[1]), np.uint8)])


def pack_up(quant: str, values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Rows of up, int8 [N, D], and their scales [N, ceil(D/32)] to bytes [N, up]."""
    rows, columns = values.shape
    spans = -(-columns // (SPAN * GROUP))
    whole = np.zeros((rows, spans * SPAN * GROUP), np.int8)
    whole[:, :columns] = values
    if quant == "q4":
        nibbles = (whole + np.int8(8)).view(np.uint8).reshape(rows, spans, SPAN, 4, 2, 4)
        joined = nibbles[..., 0, :] | (nibbles[..., 1, :] << np.uint8(4))
        stored = joined.transpose(0, 1, 3, 2, 4)  # [N, spans, register, group, 4]
    else:
        stored = whole.view(np.uint8).reshape(rows, spans, SPAN, 8, 4).transpose(0, 1, 3, 2, 4)
    spread = np.zeros((rows, spans * SPAN), np.float16)
    spread[:, : scales.shape[1]] = scales
    ends = spread.reshape(rows, spans, SPAN).view(np.uint8)
    whole_records = np.concatenate([stored.reshape(rows, spans, -1), ends], axis=2)
    return whole_records.reshape(rows, -1)


def unpack_up(quant: str, rows: NDArray[np.uint8]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Bytes [N, up] to stored values int8 [N, padded D] and scales [N, groups of them]."""
    records = rows.reshape(len(rows), -1, RECORD_BYTES[quant])
    values = unpack_values(quant, records)  # [N, spans, group, 32]
    return values.astype(np.int8).reshape(len(rows), -1), unpack_scales(quant, records).reshape(len(rows), -1)


def pack_down(quant: str, values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Columns of down, int8 [N, D] (neuron by neuron), to bytes [N, down]."""
    rows, columns = values.shape
    slices = -(-columns // SLICE)
    whole = np.zeros((rows, slices * SLICE), np.int8)
    whole[:, :columns] = values
    halves = whole.reshape(rows, slices, 2, 64)[..., _ORDER]
    if quant == "q8":
        return np.ascontiguousarray(halves).view(np.uint8).reshape(rows, -1)
    nibbles = (halves + np.int8(8)).view(np.uint8)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << np.uint8(4))).reshape(rows, -1)


def unpack_down(quant: str, columns: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Bytes [N, down] to stored values int8 [N, padded D]."""
    count = len(columns)
    if quant == "q8":
        halves = columns.reshape(count, -1, 2, 64).view(np.int8)
    else:
        stored = columns.reshape(count, -1, 64)
        halves = (np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=2)).astype(np.int8) - np.int8(
            8
        )
    values = np.empty_like(halves)
    values[..., _ORDER] = halves
    return values.reshape(count, -1)


def pack_clusters(
    quant: str,
    up: tuple[NDArray[np.int8], NDArray[np.float16]],
    down: tuple[NDArray[np.int8], NDArray[np.float16]],
) -> NDArray[np.uint8]:
    """Values and scales of up [F, D], [F, ceil(D/32)] and down [D, F], [D, ceil(F/32)] to bytes
    [clusters, bytes of one]."""
    values, scales = up
    neurons, width = values.shape
    shape, clusters = NeuronShape.of(quant, width), -(-neurons // CLUSTER)
    out = np.zeros((clusters, shape.cluster), np.uint8)
    spread = np.zeros((clusters, shape.slices * SLICE), np.float16)
    spread[:, :width] = down[1].T
    out[:, : shape.scales] = spread.view(np.uint8)
    bundles = np.zeros((clusters * CLUSTER, shape.up + shape.down), np.uint8)
    bundles[:neurons, : shape.up] = pack_up(quant, values, scales)
    bundles[:neurons, shape.up :] = pack_down(quant, np.ascontiguousarray(down[0].T))
    out[:, shape.scales :] = bundles.reshape(clusters, -1)
    return out


def parts(quant: str, data: NDArray[np.uint8], width: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Clusters' bytes to the scales of down [clusters, padded D] and the neurons [F, up + down]."""
    shape = NeuronShape.of(quant, width)
    clusters = data.reshape(-1, shape.cluster)
    scales = np.ascontiguousarray(clusters[:, : shape.scales]).view(np.float16).astype(np.float32)
    return scales, clusters[:, shape.scales :].reshape(-1, shape.up + shape.down)


def unpack(
    quant: str, data: NDArray[np.uint8], neurons: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Stored neurons as up float32 [F, D] and down float32 [D, F]."""
    shape = NeuronShape.of(quant, width)
    down_scales, bundles = parts(quant, data, width)
    values, scales = unpack_up(quant, bundles[:, : shape.up])
    up = values.reshape(len(values), -1, GROUP) * scales[..., None]
    columns = unpack_down(quant, bundles[:, shape.up :]).reshape(len(down_scales), CLUSTER, -1)
    down = (columns * down_scales[:, None, :]).reshape(len(values), -1)
    return (
        up.reshape(len(values), -1)[:neurons, :width].astype(np.float32),
        np.ascontiguousarray(down[:neurons, :width].T).astype(np.float32),
    )
