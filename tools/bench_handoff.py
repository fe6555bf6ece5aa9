#!/usr/bin/env python3
"""What a hand-off saves and costs: agreement, tokens handed over, bytes, and time over slow links.

    python tools/bench_handoff.py WHOLE.ert --text HELD_OUT.jsonl -o handoff.json --plot handoff.svg

WHOLE.ert has exits and was calibrated (`edgert calibrate`) on text that is not HELD_OUT. It is split at its
last exit into a scratch folder; the cloud half runs in a process of its own. Prompts are the first tokens
of the last stories of HELD_OUT. Agreement: of the tokens generated, those that the whole model would have
chosen after the same text. Saved: of the layers computed, summed over tokens, and of the time of forwards,
against a cloud that computes everything for one edge at a time. CE-CoLLM (arXiv:2411.02829) reports 84.55 %
of the cloud's computation saved, with other models.

The links are injected in real time: a relay passes bytes on late and no faster than the link
(handoff/slow_link.py), so a few stories are timed on each, and the medians taken.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgert
from edgert.converters import split
from edgert.evaluate import read_documents
from edgert.format import ErtFile
from edgert.handoff.setup import HandoffConfig

sys.path.append(str(Path(__file__).resolve().parent))
from handoff.cloud import Cloud, cloud_process
from handoff.slow_link import SlowLink

AGREEMENTS = (1.0, 0.999, 0.99, 0.98, 0.95, 0.9)
WIRES = ("f32", "f16", "int8")
TIMED_WIRES = ("f32", "int8")
RTTS_MS = (1, 10, 50)
MBITS = (1, 10, 100)
DEADLINE = 120.0  # nothing here is to fall back
BUDGET_LINK = 10, 10  # ms, Mbit/s: for the runs that are given a time per token
PUBLISHED = 0.8455  # of the cloud's computation: what CE-CoLLM saves, against cloud-only


def main() -> None:
    """Run what was asked for; print tables, write JSON and a plot."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        results: dict[str, Any] = {"model": options.file.name, "layers": bench.layers}
        results["layer"], results["published_saving"] = bench.layer, PUBLISHED
        results["agreement"] = shown(bench.agreement(), AGREEMENT_COLUMNS)
        if not options.no_links:
            results["links"] = shown(bench.links(), LINK_COLUMNS)
            results["budgets"] = shown(bench.budgets(), BUDGET_COLUMNS)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layer", type=int, help="where to split [the last exit]")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--timed", type=int, default=3, help="stories timed on each link")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("-n", type=int, default=64, help="tokens generated")
    parser.add_argument(
        "--at", type=float, default=0.99, help="agreement of the timed runs and the narrow wires"
    )
    parser.add_argument("--no-links", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


class Bench:
    """One model, split, and the prompts to run it on."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.edge, self.cloud = scratch / "edge.ert", scratch / "cloud.ert"
        with ErtFile.open(options.file) as file:
            self.layers = file.spec.layers
            self.layer = options.layer or file.spec.exits[-1]
        split(options.file, self.layer, self.edge, self.cloud)
        with edgert.load(options.file, threads=1) as model:
            texts = read_documents(options.text, options.stories)
            self.prompts = [model.tokenizer.encode(text)[: options.prompt] for text in texts]

    def agreement(self) -> Iterator[dict[str, Any]]:
        """One row per wanted agreement, then per narrow wire."""
        with cloud_process(self.options.file) as whole:
            config = HandoffConfig("cloud", whole.address, deadline_s=DEADLINE)
            with edgert.load(self.edge, threads=1, handoff=config) as model:
                model.generate(self.prompts[0], max_tokens=2)  # compiles
                alone = whole.seconds()
                for prompt in self.prompts:
                    model.generate(prompt, max_tokens=self.options.n)
            alone = whole.seconds() - alone
        with cloud_process(self.cloud) as half:
            for agreement in AGREEMENTS:
                yield self._agreement_row(half, agreement, "f32", alone)
            for wire in WIRES[1:]:
                for agreement in (1.0, self.options.at):
                    yield self._agreement_row(half, agreement, wire, alone)

    def _agreement_row(self, cloud: "Cloud", agreement: float, wire: Any, alone: float) -> dict[str, Any]:
        config = HandoffConfig(cloud=cloud.address, agreement=agreement, wire=wire, deadline_s=DEADLINE)
        tokens = rows = over = up = down = computed = 0
        runs: list[tuple[list[int], list[int]]] = []
        with edgert.load(self.edge, threads=1, handoff=config) as model:
            model.generate(self.prompts[0], max_tokens=2)  # compiles, in the first row
            began = cloud.seconds()
            for prompt in self.prompts:
                done = model.generate(prompt, max_tokens=self.options.n)
                runs.append((prompt, list(done.tokens)))
                tokens += len(done.tokens)
                over += done.stats["handoffs"]
                up, down = up + done.stats["bytes_up"], down + done.stats["bytes_down"]
                computed += done.stats["cloud_layer_tokens"]
                rows += len(prompt) + len(done.tokens)
        seconds = cloud.seconds() - began
        return {
            "wanted": agreement,
            "wire": wire,
            "tokens": tokens,
            "agreed": self._agreed(runs),
            "handed_over": over / tokens,
            "cloud_layers_saved": 1 - computed / (self.layers * rows),
            "cloud_time_saved": 1 - seconds / alone,
            "bytes_up_per_token": up / tokens,
            "bytes_down_per_token": down / tokens,
        }

    def _agreed(self, runs: Sequence[tuple[list[int], list[int]]]) -> float:
        """Of the generated tokens, those that the whole model chooses after the same text."""
        agreed = 0
        with edgert.load(self.options.file, threads=1) as whole:
            for prompt, generated in runs:
                if generated:
                    logits = whole.logits([*prompt, *generated[:-1]])[len(prompt) - 1 :]
                    agreed += int((logits.argmax(axis=1) == np.array(generated)).sum())
        return agreed / sum(len(generated) for _, generated in runs)

    def links(self) -> Iterator[dict[str, Any]]:
        """Milliseconds per token on each link: edge alone, cloud alone, and together."""
        prompts = self.prompts[: self.options.timed]
        alone = self._time(self.edge, prompts, HandoffConfig("local"))
        with cloud_process(self.cloud) as half, cloud_process(self.options.file) as whole:
            for rtt in RTTS_MS:
                for mbit in MBITS:
                    row: dict[str, Any] = {"rtt_ms": rtt, "mbit": mbit, "edge_only": alone}
                    with SlowLink(whole.address, rtt, mbit) as link:
                        config = HandoffConfig("cloud", link.address, deadline_s=DEADLINE)
                        row["cloud_only"] = self._time(self.edge, prompts, config)
                    with SlowLink(half.address, rtt, mbit) as link:
                        for wire in TIMED_WIRES:
                            config = HandoffConfig(
                                cloud=link.address, agreement=self.options.at, wire=wire, deadline_s=DEADLINE
                            )
                            row[f"together_{wire}"] = self._time(self.edge, prompts, config)
                    yield row

    def _time(self, file: Path, prompts: Sequence[list[int]], config: HandoffConfig) -> float:
        """Median over the prompts, after one to warm up, of milliseconds per token with its prompt."""
        return self._timed(file, prompts, config)[0]

    def budgets(self) -> Iterator[dict[str, Any]]:
        """Wanted times per token on one link, between those of the edge alone and of handing all over."""
        prompts = self.prompts[: self.options.timed]
        rtt, mbit = BUDGET_LINK
        with cloud_process(self.cloud) as half, SlowLink(half.address, rtt, mbit) as link:
            config = HandoffConfig(cloud=link.address, deadline_s=DEADLINE)
            least, most = (
                self._time(self.edge, prompts, HandoffConfig("local")),
                self._time(self.edge, prompts, config),
            )
            for part in (0.25, 0.5, 0.75):
                wanted = least + part * (most - least)
                config = HandoffConfig(cloud=link.address, time_budget_s=wanted / 1000, deadline_s=DEADLINE)
                got, runs, over = self._timed(self.edge, prompts, config)
                yield {
                    "wanted_ms": wanted,
                    "ms": got,
                    "handed_over": over,
                    "agreed": self._agreed(runs),
                    "edge_only": least,
                    "all_handed_over": most,
                }

    def _timed(
        self, file: Path, prompts: Sequence[list[int]], config: HandoffConfig
    ) -> tuple[float, list[tuple[list[int], list[int]]], float]:
        """Median over the prompts, after one to warm up, of milliseconds per token with its prompt.

        Also (prompt, tokens generated) of each, and the share of tokens handed over.
        """
        times, runs, over = [], [], 0
        with edgert.load(file, threads=1, handoff=config) as model:
            for prompt in (prompts[0], *prompts):
                began = time.perf_counter()
                done = model.generate(prompt, max_tokens=self.options.n)
                times.append((time.perf_counter() - began) * 1000 / max(1, len(done.tokens)))
                runs.append((prompt, list(done.tokens)))
                over += done.stats["handoffs"]
        tokens = sum(len(generated) for _, generated in runs)
        return statistics.median(times[1:]), runs[1:], over / tokens


AGREEMENT_COLUMNS = {
    "wanted": "{:.3f}",
    "wire": "{}",
    "agreed": "{:.2%}",
    "handed_over": "{:.1%}",
    "cloud_layers_saved": "{:.1%}",
    "cloud_time_saved": "{:.1%}",
    "bytes_up_per_token": "{:.0f}",
    "bytes_down_per_token": "{:.0f}",
}
LINK_COLUMNS = {"rtt_ms": "{}", "mbit": "{}"} | dict.fromkeys(
    ("edge_only", "cloud_only", *(f"together_{wire}" for wire in TIMED_WIRES)), "{:.2f}"
)
BUDGET_COLUMNS = {
    "wanted_ms": "{:.2f}",
    "ms": "{:.2f}",
    "handed_over": "{:.1%}",
    "agreed": "{:.2%}",
    "edge_only": "{:.2f}",
    "all_handed_over": "{:.2f}",
}


def shown(rows: Iterator[dict[str, Any]], columns: dict[str, str]) -> list[dict[str, Any]]:
    """All rows, each printed as it comes: a table with the columns' formats."""
    print("| " + " | ".join(name.replace("_", " ") for name in columns) + " |")
    print("|" + " ---: |" * len(columns), flush=True)
    taken = []
    for row in rows:
        taken.append(row)
        print("| " + " | ".join(form.format(row[name]) for name, form in columns.items()) + " |", flush=True)
    print()
    return taken


def plot(results: dict[str, Any], path: Path) -> None:
    """Agreement against tokens handed over, and time against the link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "edgert", "font.size": 9})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    rows = [row for row in results["agreement"] if row["wire"] == "f32"]
    shares = [100 * row["handed_over"] for row in rows]
    left.plot(shares, [100 * row["agreed"] for row in rows], "o-", label="tokens as the whole model's")
    left.plot(shares, [100 * row["cloud_layers_saved"] for row in rows], "s--", label="cloud layers saved")
    left.plot(shares, [100 * row["cloud_time_saved"] for row in rows], "^:", label="cloud time saved")
    left.axhline(100 * PUBLISHED, color="grey", lw=0.8, label="CE-CoLLM's saving, other models")
    left.set(xlabel="tokens handed over, %", ylabel="%")
    left.legend()
    links = results.get("links", [])
    names = [f"{row['rtt_ms']} ms\n{row['mbit']} Mbit/s" for row in links]
    for name in ("edge_only", "cloud_only", "together_f32", "together_int8"):
        right.plot(names, [row[name] for row in links], "o-", label=name.replace("_", " "))
    right.set(ylabel="ms per token", yscale="log")
    right.tick_params("x", labelsize=7)
    if links:
        right.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


if __name__ == "__main__":
    main()
