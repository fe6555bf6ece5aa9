"""Write docs/models.md: what the bundled family is worth, every figure with the command that gives it.

    python tools/report_models.py --text TEXT.jsonl --twin FOLDER

TEXT holds one {"text": ...} a line; the last 200 are held out, no model of the family was trained on them.
FOLDER is the target's dense twin (tools/family/train.py export dense), which is not in the repository.
`--only SECTION` prints one section instead. Needs torch and transformers, for what happens inside a layer;
everything else is measured with edgert's own kernels.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgert
from edgert.config import EngineConfig, Quant
from edgert.evaluate import evaluate, read_documents
from edgert.format import ErtFile
from edgert.model.forward import Forward
from edgert.state import MAX_OUTPUTS, Weights
from edgert.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "edgert" / "assets"
HELD_OUT = 200
QUANTS: tuple[Quant, ...] = ("f16", "q8", "q4")
BOUNDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of confidence, as in the file
PROMPTS = ("Once upon a time", "Tom had a big red ball.", "The little bird was sad because")
SAMPLE = {"max_tokens": 110, "temperature": 0.7, "top_p": 0.95}
TWIN = (
    " The twin is the target with SiLU instead of ReLU and no push to zero, from the same base and for as "
    "many steps."
)
PREAMBLE = """\
# The bundled models

A family of small story models, trained for this repository, so that everything edgert does can be seen
and judged on trained weights. TEXT below is the file of 5,000 published TinyStories (Eldan and Li, 2023,
arXiv:2305.07759) whose last 200 are held out: no model saw them in training. The cards say how each was made:
[target](../edgert/assets/target/README.md), [draft](../edgert/assets/draft/README.md),
[moe](../edgert/assets/moe/README.md). Written by `python tools/report_models.py --text TEXT --twin TWIN`.
"""


@dataclass(frozen=True, slots=True)
class Family:
    """Where everything is."""

    text: Path
    documents: list[str]
    twin: Path | None
    scratch: Path

    @property
    def names(self) -> list[str]:
        """The models that are here."""
        return [name for name in ("target", "draft", "moe") if (ASSETS / name).is_dir()]

    def folder(self, name: str) -> Path:
        """A model as a Hugging Face folder."""
        if name != "twin":
            return ASSETS / name
        if self.twin is None:
            raise SystemExit("this section compares the target with its twin: give --twin FOLDER")
        return self.twin

    def file(self, name: str, quant: Quant = "f16") -> Path:
        """A model as an .ert file."""
        path = self.scratch / f"{name}-{quant}.ert"
        if not path.exists():
            edgert.convert(self.folder(name), path, quant)
        return path

    def tokens(self) -> list[list[int]]:
        """The held-out stories as the target sees them."""
        tokenizer = Tokenizer((ASSETS / "target" / "tokenizer.json").read_bytes())
        return [tokenizer.encode(text) for text in self.documents]


@contextmanager
def forward_of(path: Path) -> Iterator[Forward]:
    """The forward path of a file."""
    with ErtFile.open(path) as file:
        forward = Forward(Weights.of_file(file), EngineConfig(1, file.spec.context, MAX_OUTPUTS))
        try:
            yield forward
        finally:
            forward.close()


def section(text: str, figures: str) -> str:
    """A paragraph and what it is about."""
    return f"{textwrap.fill(text, 100)}\n\n{figures}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def perplexity(family: Family) -> str:
    """Of every model in every precision."""
    names = [*family.names, *(["twin"] if family.twin else [])]
    rows = []
    for name in names:
        found = []
        for quant in QUANTS:
            with edgert.load(family.file(name, quant)) as model:
                found.append(evaluate(model, family.documents))
        parameters = edgert.convert(family.folder(name), family.scratch / "size.ert", "q4").parameters
        figures = (f"{result.perplexity:.3f}" for result in found)
        rows.append([name, f"{parameters / 1e6:.2f} M", *figures, f"{found[0].bits_per_byte:.4f}"])
    shown = table(["model", "weights", *QUANTS, "bits per byte (f16)"], rows)
    commands = (
        "    edgert convert edgert/assets/NAME -o NAME.ert --quant QUANT\n"
        f"    edgert eval NAME.ert --text TEXT --last {HELD_OUT}\n\n"
    )
    return section(
        "Perplexity per token on the held-out stories, by precision of the weights; those of the target are "
        "counted with its exits." + (TWIN if family.twin else ""),
        commands + shown,
    )


def zeros(family: Family) -> str:
    """Share of FFN activations that are exactly zero, per layer, of the target and its twin."""
    shares = {name: _zero_shares(family, name) for name in ("target", *(["twin"] if family.twin else []))}
    head = ["layer", *(str(i) for i in range(len(shares["target"]))), "mean"]
    rows = [
        [name, *(f"{share:.1%}" for share in found), f"{np.mean(found):.1%}"]
        for name, found in shares.items()
    ]
    return section(
        "Share of the activations act(gate) that are exactly zero on the held-out stories: neurons whose up "
        "and down weights need not be read.",
        table(head, rows),
    )


def _zero_shares(family: Family, name: str) -> list[float]:
    counts: dict[int, NDArray[np.int64]] = {}

    def watch(index: int, layer: object) -> tuple[object, Callable[..., None]]:
        def count(module: object, inputs: object, out: object) -> None:
            zero = layer.mlp.act_fn(out) == 0
            counts[index] = counts.get(index, 0) + np.array([int(zero.sum()), zero.numel()])

        return layer.mlp.gate_proj, count

    _watch_layers(family, name, watch)
    return [counts[i][0] / counts[i][1] for i in sorted(counts)]


def experts(family: Family) -> str:
    """How often each expert of each layer is chosen."""
    loads: dict[int, NDArray[np.int64]] = {}

    def watch(index: int, layer: object) -> tuple[object, Callable[..., None]]:
        def count(module: object, inputs: object, out: tuple[object, ...]) -> None:
            chosen = np.bincount(out[2].numpy().reshape(-1), minlength=layer.mlp.gate.num_experts)
            loads[index] = loads.get(index, 0) + chosen

        return layer.mlp.gate, count

    _watch_layers(family, "moe", watch)
    rows = []
    for index in sorted(loads):
        share = np.sort(loads[index] / loads[index].sum())[::-1]
        even = float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum()))
        shares = " ".join(f"{100 * one:.1f}" for one in share)
        rows.append([str(index), shares, f"{even:.1f}"])
    count = len(loads[0])
    return section(
        f"Share of the choices that fall on each of the {count} experts, in percent, largest first (even: "
        f"{100 / count:.2f}), on the held-out stories; and how many evenly used experts would have the same "
        "entropy.",
        table(["layer", "load of each expert, %", "experts in use"], rows),
    )


def _watch_layers(
    family: Family, name: str, watch: Callable[[int, object], tuple[object, Callable[..., None]]]
) -> None:
    """Run a model in transformers over the held-out stories; `watch` gives a layer's module and its hook."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family.folder(name), dtype=torch.float32)
    for index, layer in enumerate(model.model.layers):
        module, hook = watch(index, layer)
        module.register_forward_hook(hook)
    with torch.no_grad():
        for ids in family.tokens():
            model(torch.tensor([ids[: model.config.max_position_embeddings]]), use_cache=False)


def exits(family: Family) -> str:
    """How often each exit agrees with the whole model, by its confidence, counted with our own kernels."""
    path = family.file("target")
    with ErtFile.open(path) as file:
        calibration, layers = file.exits, file.spec.layers
    kept = {layer: np.zeros((2, len(BOUNDS)), np.int64) for layer in calibration}
    with forward_of(path) as forward:
        for ids in _pieces(family, forward):
            reached = 0
            logits = {}
            for layer in (*calibration, layers):
                rows = forward.run(ids, layers=(reached, layer), outputs=range(len(ids)))
                logits[layer], reached = rows.copy(), layer
            final = logits.pop(layers).argmax(-1)
            for layer, rows in logits.items():
                sure = _softmax(rows / calibration[layer].temperature).max(-1)
                bucket = np.searchsorted(BOUNDS, sure, side="right") - 1
                kept[layer][0] += np.bincount(bucket, minlength=len(BOUNDS))
                kept[layer][1] += np.bincount(bucket[rows.argmax(-1) == final], minlength=len(BOUNDS))
    head = ["confidence at least", *(f"{bound:g}" for bound in BOUNDS)]
    rows = []
    for layer, (tokens, agreed) in kept.items():
        above = tokens[::-1].cumsum()[::-1], agreed[::-1].cumsum()[::-1]
        rows.append([f"after {layer}: share of tokens", *(f"{n / tokens.sum():.1%}" for n in above[0])])
        rows.append(
            [f"after {layer}: agree", *(f"{a / n:.1%}" if n else "" for n, a in zip(*above, strict=True))]
        )
    temperatures = ", ".join(f"{c.temperature:.2f} after {layer}" for layer, c in calibration.items())
    return section(
        f"How often an exit's first choice is that of all {layers} layers, among the tokens of which it is "
        f"at least so sure, on the held-out stories (f16 weights; temperatures: {temperatures}). Half of "
        "these stories set the temperature, one number per exit; `edgert inspect` shows the counts on the "
        "other half.",
        table(head, rows),
    )


def draft(family: Family) -> str:
    """How often the draft says what the target says."""
    rows = []
    for quant in ("f16", "q4"):
        sums = np.zeros(4)
        with (
            forward_of(family.file("target", quant)) as target,
            forward_of(family.file("draft", quant)) as small,
        ):
            for ids in _pieces(family, target):
                if target.cache.length == 0:
                    small.cache.rewind(0)
                p, q = (_softmax(m.run(ids, outputs=range(len(ids)))) for m in (target, small))
                agree = (p.argmax(-1) == q.argmax(-1)).sum()
                kl = (p * (np.log(p) - np.log(q))).sum()
                sums += [len(ids), agree, np.minimum(p, q).sum(), kl]
        tokens, agree, accept, kl = sums[0], *(sums[1:] / sums[0])
        run = sum(agree**k for k in range(5))
        rows.append([quant, f"{tokens:.0f}", f"{agree:.1%}", f"{accept:.1%}", f"{kl:.3f}", f"{run:.2f}"])
    head = ["weights of both", "tokens", "same first choice", "mean of sum min(p, q)", "KL, nats"]
    return section(
        "How often the draft's first choice is the target's (what greedy speculation accepts), the overlap "
        "of their distributions (what sampled speculation accepts), and how many tokens a verification of "
        "four guesses in a row would give at that rate, on the held-out stories.",
        table([*head, "tokens per verification"], rows),
    )


def _pieces(family: Family, forward: Forward) -> Iterator[list[int]]:
    """The held-out stories in pieces of up to MAX_OUTPUTS tokens, each story from an empty cache."""
    for ids in family.tokens():
        forward.cache.rewind(0)
        fits = ids[: forward.cache.limit]
        for start in range(0, len(fits), MAX_OUTPUTS):
            yield fits[start : start + MAX_OUTPUTS]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def samples(family: Family) -> str:
    """Three stories of each model, sampled."""
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SAMPLE.items())
    parts = [f"Sampled with `edgert run NAME.ert -p PROMPT {options} --seed 1`, f16 weights, not selected."]
    for name in family.names:
        parts.append(f"### {name}")
        with edgert.load(family.file(name), threads=1) as model:
            for prompt in PROMPTS:
                done = model.generate(prompt, seed=1, **SAMPLE)
                text = " ".join((prompt + done.text).split())
                parts.append(f"> **{prompt}**{text[len(prompt) :]}")
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, Callable[[Family], str]]] = {
    "perplexity": ("How well they predict", perplexity),
    "zeros": ("Zeros in the target's feed-forward", zeros),
    "experts": ("Load of the experts", experts),
    "exits": ("What the target's exits know", exits),
    "draft": ("How well the draft guesses", draft),
    "samples": ("What they write", samples),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--twin", type=Path, help="the target's dense twin, as a Hugging Face folder")
    parser.add_argument("--only", choices=SECTIONS, help="print this section instead of writing the page")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        family = Family(args.text, read_documents(args.text, HELD_OUT), args.twin, Path(scratch))
        if args.only:
            print(SECTIONS[args.only][1](family))
            return
        parts = [PREAMBLE]
        for name, (title, measure) in SECTIONS.items():
            if name == "experts" and "moe" not in family.names:
                continue
            command = f"    python tools/report_models.py --text TEXT --twin TWIN --only {name}\n\n"
            parts.append(f"## {title}\n\n{command}{measure(family)}\n")
            print(f"{name}: done", flush=True)
        args.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
