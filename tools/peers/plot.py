"""The plot of ratios. Runs in the peers' environment: python -m peers.plot OUT, the bars on its input.

The input is JSON: {"label": {"runtime": [median, least, most]}, ...}.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"llama.cpp": "#3b6ea5", "onnxruntime-genai": "#c98a2b"}
BAR = 0.36


def draw(bars: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Horizontal bars from 1.0: right of it edgert is faster."""
    # Text stays text and nothing is drawn at random or dated: a small file that only data change.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edgert", "font.size": 9})
    figure, axes = plt.subplots(figsize=(8.5, 0.8 + 0.4 * len(bars)), layout="constrained")
    for shift, (runtime, color) in enumerate(COLORS.items()):
        rows = [(at, values[runtime]) for at, values in enumerate(bars.values()) if runtime in values]
        if not rows:
            continue
        places = [at + (shift - 0.5) * BAR for at, _ in rows]
        medians = [median for _, (median, _, _) in rows]
        reach = [[m - least for _, (m, least, _) in rows], [most - m for _, (m, _, most) in rows]]
        widths = [median - 1 for median in medians]
        axes.barh(
            places, widths, BAR, left=1, xerr=reach, color=color, label=f"over {runtime}", ecolor="#333"
        )
    axes.axvline(1, color="#333", linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("edgert's speed over the peer's: median of paired rounds, least to most")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if out.suffix == ".svg" else {}
    figure.savefig(out, metadata=metadata, dpi=110)


if __name__ == "__main__":
    draw(json.load(sys.stdin), Path(sys.argv[1]))
