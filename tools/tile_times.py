"""How long one record (16 rows x 32 of q4 weights, 288 bytes) takes, from memory and in cache.

Usage: python tools/tile_times.py [ROUNDS]. For each number of rows and each tiling: the least and the
median of the rounds, one thread, a matrix of 151 MB in large pages, beside the streaming reader in the same
rounds. This is where the figures of docs/speed.md come from.
"""

import statistics
import sys
import time

from edgert.devices.probe import Product, StreamReader
from edgert.kernels import packing, target

RECORD = packing.RECORD_BYTES["q4"]
TILINGS = (
    (1, 8, 0),
    (2, 8, 0),
    *((rows, 8, ahead) for rows in (4, 8) for ahead in (0, 8, 16, 64, 128)),
    (8, 4, 64),
)


def seconds(work: Product, rows: int, most: int, ahead: int) -> float:
    """Time of one product, per record."""
    began = time.perf_counter()
    work.run(rows, most, ahead)
    return (time.perf_counter() - began) / (work.blocks * work.groups)


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    large, small, reader = Product(131072, 2048, 8), Product(256, 2048, 8), StreamReader(1)
    times: dict[tuple[int, int, int], list[float]] = {tiling: [] for tiling in TILINGS}
    stream = []
    for turn in range(rounds + 1):
        stream.append(reader.nbytes / reader.seconds() / 1e9)
        for tiling, kept in times.items():
            found = seconds(large, *tiling)
            if turn:
                kept.append(found)
    best, middle = max(stream), statistics.median(stream)
    print(f"{target.lowering().name}; streaming reader: best {best:.1f} GB/s, median {middle:.1f}")
    print("rows  most  ahead   least  median (ns per record)   GB/s")
    for (rows, most, ahead), kept in times.items():
        least, middle = min(kept) * 1e9, statistics.median(kept) * 1e9
        print(
            f"{rows:4}  {most:4}  {ahead:5}  {least:6.2f}  {middle:6.2f}               {RECORD / least:.1f}"
        )
    for rows in (1, 2, 4, 8):
        least = min(seconds(small, rows, 8, 64) for _ in range(300))
        print(f"{rows:4} rows in cache: {least * 1e9:.2f} ns per record, least of 300")


if __name__ == "__main__":
    main()
