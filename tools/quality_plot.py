"""Draw what quality_curve.py measured; needs matplotlib alone.

python tools/quality_plot.py quality.json quality.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Point = dict[str, Any]


def plot(points: list[Point], out: Path) -> None:
    """One panel per model: how much worse than float32, on a logarithmic axis."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edgert", "font.size": 9})
    models = list(dict.fromkeys(p["model"] for p in points))
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.6 * len(models), 4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        own = [p for p in points if p["model"] == model]
        exact = next(p["perplexity"] for p in own if p["series"] == "float32")
        for series in dict.fromkeys(p["series"] for p in own if p["series"] != "float32"):
            line = sorted((p for p in own if p["series"] == series), key=lambda p: p["bits"])
            worse = [100 * (p["perplexity"] / exact - 1) for p in line]
            style = "o-" if series == "edgert, --bits" else "o--" if "edgert" in series else "s"
            panel.plot([p["bits"] for p in line], worse, style, ms=4, lw=1.2, label=series)
            for p, height in zip(line, worse, strict=True) if "bits" not in series else ():
                panel.annotate(
                    p["name"], (p["bits"], height), fontsize=6, xytext=(3, 2), textcoords="offset points"
                )
        panel.set(
            title=model, xlabel="bits per weight, all tensors", yscale="log", xlim=(2, 6.3), ylim=(0.3, 1000)
        )
        panel.set_ylabel("perplexity above float32, %")
        panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else {})


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())["points"], Path(sys.argv[2]))
