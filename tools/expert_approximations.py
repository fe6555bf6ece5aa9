"""What the opt-in approximations of streamed experts cost in quality, and what they spare in bytes.

    python tools/expert_approximations.py MODEL.ert --text FILE [--last 200] [--share 0.25] [-o FILE.md]
        [--stand-ins SMALL.ert]

Perplexity over the last lines of a text, one token at a time as in decoding, with room for a share of the
experts: exact, and with each approximation at some strengths. Which experts are in memory decides on the
text, so a row can differ a little from run to run; the first row cannot.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgert.config import EngineConfig
from edgert.experts import open_streamed
from edgert.flash import Streaming
from edgert.format import ErtFile
from edgert.model.forward import Forward
from edgert.planner import plan
from edgert.sampling import log_probability
from edgert.tokenizer import Tokenizer

CHOICES = {
    "exact": {},
    **{f"swap_near={share}": {"swap_near": share} for share in (0.1, 0.25, 0.5)},
    **{f"drop_below={share}": {"drop_below": share} for share in (0.1, 0.2, 0.4)},
    "swap_near=0.25, drop_below=0.2": {"swap_near": 0.25, "drop_below": 0.2},
}
STAND_IN = (0.2, 0.4, 1.0)
"""Shares of a token's weight up to which a missing expert is read from the stand-ins."""


def measure(path: Path, texts: list[str], share: float, choices: dict[str, Any]) -> dict[str, float]:
    """Perplexity, bytes read per token, and the share of choices changed."""
    with ErtFile.open(path) as file:
        spec = file.spec
        config: EngineConfig = plan(spec, file.size, context=spec.context, threads=1)
        count = sum(t.role == "expert" for t in file.tensors.values())
        # Nothing is read ahead: which experts are there would depend on the clock.
        streaming = Streaming(predictor="none", readers=1, **choices)
        weights, store = open_streamed(file, max(spec.active_experts, round(share * count)), streaming)
        tokenizer = Tokenizer(file.tokenizer_json() or b"")
        forward = Forward(weights, config, store)
    lost, tokens = 0.0, 0
    try:
        for text in texts:
            forward.cache.rewind(0)
            ids = tokenizer.encode(text)[: spec.context - 1]
            for token, following in pairwise(ids):
                lost -= log_probability(forward.run([token], outputs=[0])[0], following)
                tokens += 1
        total = store.totals()
    finally:
        forward.close()
    chosen = tokens * spec.active_experts * sum(bool(group) for group in store.index)
    return {
        "perplexity": math.exp(lost / tokens),
        "bytes_per_token": total["bytes_read"] / tokens,
        "changed": (total["swapped"] + total["dropped"] + total["stood_in"]) / chosen,
        "tokens": tokens,
    }


def main() -> None:
    """Measure every choice; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a text or a JSON object per line")
    parser.add_argument("--last", type=int, default=200, help="lines from the end of the text")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts, that have room")
    parser.add_argument("--stand-ins", type=Path, help="the same model in fewer bits")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    lines = args.text.read_text("utf-8").splitlines()[-args.last :]
    texts = [json.loads(line)["text"] if line.startswith("{") else line for line in lines]
    rows = [
        "| choice | perplexity | against exact | KB read a token | choices changed |",
        "|---|---|---|---|---|",
    ]
    exact, asked = 0.0, dict[str, dict[str, Any]](CHOICES)
    for below in STAND_IN if args.stand_ins else ():
        asked[f"stand_in_below={below}"] = {"stand_in_below": below, "stand_ins": str(args.stand_ins)}
    for name, choices in asked.items():
        found = measure(args.model, texts, args.share, choices)
        exact = exact or found["perplexity"]
        rows.append(
            f"| {name} | {found['perplexity']:.4f} | {found['perplexity'] / exact - 1:+.2%} "
            f"| {found['bytes_per_token'] / 1e3:.0f} | {found['changed']:.1%} |"
        )
        print(rows[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
