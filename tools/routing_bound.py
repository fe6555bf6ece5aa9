"""The most that any cache of experts could hold ready: hit rates over a replayed trace of routing.

    python tools/routing_bound.py trace.npz --slots 142 --slots 446

The trace is that of `tools/bench_experts.py`, widened to OLMoE-1B-7B's shape as there. The best cache knows
the future: it gives up what is needed last (Belady, 1966), or does not keep what comes even later. lru is
what edgert does by default. The first sixth of the tokens fills the cache and is not counted.
"""

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from routing_replay import picks

from edgert.model.shapes import shape

Expert = tuple[int, int]  # layer and number
NEVER = 1 << 62


def best(asked: Sequence[Expert], slots: int, counted: int) -> float:
    """The share of hits, from request `counted` on, of a cache that knows what will be asked."""
    following, seen = [NEVER] * len(asked), dict[Expert, int]()
    for at in range(len(asked) - 1, -1, -1):
        following[at] = seen.get(asked[at], NEVER)
        seen[asked[at]] = at
    held: dict[Expert, int] = {}  # when each is needed next
    hits = 0
    for at, expert in enumerate(asked):
        if expert in held:
            hits += at >= counted
        elif len(held) >= slots:
            last = max(held, key=lambda e: held[e])
            if held[last] <= following[at]:
                continue
            del held[last]
        held[expert] = following[at]
    return hits / (len(asked) - counted)


def lru(asked: Sequence[Expert], slots: int, counted: int) -> float:
    """The share of hits, from request `counted` on, where what was not used longest goes."""
    held: OrderedDict[Expert, None] = OrderedDict()
    hits = 0
    for at, expert in enumerate(asked):
        if expert in held:
            hits += at >= counted
        elif len(held) >= slots:
            held.popitem(last=False)
        held[expert] = None
        held.move_to_end(expert)
    return hits / (len(asked) - counted)


def main() -> None:
    """Print a line per number of slots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--slots", type=int, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    spec, trace = shape("olmoe-1b-7b"), dict(np.load(args.trace))
    asked = [
        (layer, int(expert))
        for token in range(args.tokens)
        for layer in range(spec.layers)
        for expert in picks(spec, trace, "chosen", token, layer)
    ]
    for slots in args.slots:
        counted = len(asked) // 6
        print(
            f"{slots} slots of {spec.layers * spec.experts} experts: hits {lru(asked, slots, counted):.1%} "
            f"with lru, {best(asked, slots, counted):.1%} at best"
        )


if __name__ == "__main__":
    main()
