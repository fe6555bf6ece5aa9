"""What leaving out the neurons that do not fire gives, in time.

    bench_sparsity.py shape [--shape NAME] [--zeros 0.85,0.6] [--predicted 2.1] [--rank R] [--layers N] [-t N]
    bench_sparsity.py shape --zeros "" --core 0.4,0.2 [--layers N] [-t N]
    bench_sparsity.py model FOLDER [--quant q4] [-t THREADS] [-r ROUNDS]
    bench_sparsity.py quality FOLDER --calibrate TEXT --text TEXT [--last 200] [--shares 0.25,0.4,0.5,0.6]
    bench_sparsity.py quality FOLDER --calibrate TEXT --text TEXT --ways core --shares 0.6,0.4 [--prompt 64]

`shape`: random weights of a published shape, their gates planted so that a chosen share of the activations is
zero: how often a neuron fires follows the family's target (FIRING). With --predicted also with predictors,
planted to expect so many times the neurons that fire, and those among them: only the time is that of
a real one, of which `edgert inspect` says how many it expects. With --core also what goes on with such a
share of its neurons, without zeros among them, as a model with SiLU does. `model`: a Hugging Face model with
ReLU, converted both ways; greedy generation must give the same tokens. Rounds are interleaved; medians are
shown.
`quality`: perplexity with ever more activations (CATS) or inputs (TEAL) taken for zero, or of what follows
the first tokens of each text with ever fewer neurons, those that these used most, or without ever more
feed-forwards; and what verification makes of it: the same greedy tokens as without, and how many are kept
of a guess.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

import edgert
from edgert.config import EngineConfig
from edgert.evaluate import evaluate, read_documents
from edgert.format import StoredTensor
from edgert.kernels import program
from edgert.model.forward import Forward
from edgert.model.shapes import random_weights, shape
from edgert.state import Weights

FIRING = (
    (0.0, 0.14),
    (0.1, 0.6),
    (0.25, 0.78),
    (0.5, 0.99),
    (0.75, 1.2),
    (0.9, 1.43),
    (0.95, 1.6),
    (1.0, 2.4),
)
"""Quantiles of how often a neuron fires, over the mean: layer 5 of the family's target on 60 stories."""
TOKENS = 16
"""Tokens of one timing."""


def planted(weights: Weights, zeros: float, hottest_first: bool = False) -> None:
    """Scale the rows of every gate so that neurons, at a threshold of 1, fire as often as FIRING says.

    A random gate is about normal with a deviation of 1 before its row is scaled. hottest_first: in the order
    of a calibration.
    """
    spec, rng = weights.spec, np.random.default_rng(7)
    data = weights.data.view()
    data.flags.writeable = True
    for layer in range(spec.layers):
        often = how_often(rng, spec.ffn_width, 1 - zeros)
        if hottest_first:
            often = -np.sort(-often)
        # P(s N > 1) = p for s = 1 / quantile(1 - p)
        factors = np.array([1 / NormalDist().inv_cdf(1 - min(p, 0.49)) for p in often], np.float32)
        gate = weights.tensors[f"layers.{layer}.gate"]
        rescale(rng, records_of(data, gate), factors)


def foretold(weights: Weights, zeros: float, predicted: float) -> None:
    """Predictors that expect `predicted` times as many neurons as fire, and gates that fire for 1 in so many.

    Scores are normal around a bias: P(N + b > 0) = p for b = quantile(p). Given that it is expected, a neuron
    fires with one probability for all: so each is expected and fires as often as FIRING says.
    """
    spec, rng = weights.spec, np.random.default_rng(7)
    data = weights.data.view()
    data.flags.writeable = True
    fires = np.float32(1 / NormalDist().inv_cdf(1 - min(1 / predicted, 0.49)))
    for layer in range(spec.layers):
        often = how_often(rng, spec.ffn_width, (1 - zeros) * predicted)
        bias = np.array([NormalDist().inv_cdf(p) for p in often.clip(1e-6, 1 - 1e-6)], np.float32)
        name = f"layers.{layer}"
        for tensor in (weights.tensors[f"{name}.predictor_{end}"] for end in ("in", "out")):
            rescale(rng, records_of(data, tensor), np.ones(tensor.shape[0], np.float32))
        gate, end = weights.tensors[f"{name}.gate"], weights.tensors[f"{name}.predictor_out_bias"]
        rescale(rng, records_of(data, gate), np.full(spec.ffn_width, fires))
        data[end.offset : end.offset + end.nbytes] = bias.view(np.uint8)


def how_often(rng: np.random.Generator, neurons: int, mean: float) -> np.ndarray:
    """How often each neuron fires, in the mean over them `mean`."""
    share, over = zip(*FIRING, strict=True)
    return np.interp(rng.random(neurons), share, over) * mean


def records_of(data: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """The float16 scales of a random matrix in q4, a view as its rows lie: [blocks, records, 16]."""
    blocks = -(-tensor.shape[0] // 16)
    records = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(blocks, -1, 288)
    return records[:, :, -32:].view(np.float16)


def rescale(rng: np.random.Generator, scales: np.ndarray, factors: np.ndarray) -> None:
    """Rows of a random matrix times `factors`, so that products with normal rows have these deviations.

    Uniform nibbles have a mean: random signs of the groups take it out, and leave a deviation of 1.17.
    """
    signs = rng.choice(np.float32([-1, 1]), scales.shape) / np.float32(1.17)
    blocks = len(scales)
    padded = np.ones(blocks * 16, np.float32)
    padded[: len(factors)] = factors
    scales[:] = scales * signs * padded.reshape(blocks, 1, 16)


def zeros_of(forward: Forward, tokens: list[int]) -> float:
    """The mean share of activations that are zero in the last layer that ran, for the rows of `tokens`."""
    zeros = []
    code = forward.code
    stop = [i for i, row in enumerate(code) if row[0] == program.NEURONS_UP]
    for token in tokens:
        forward.run([token], outputs=[0])
        row = code[stop[-1]]
        live = int(row[3 + program.FIELDS[program.NEURONS_UP].index("live")])
        zeros.append(1 - forward.state.routes[live] / forward.spec.ffn_width)
    forward.cache.rewind(0)
    return float(np.mean(zeros))


def seconds_per_token(forward: Forward) -> float:
    """Of TOKENS tokens, one by one, from an empty cache; behind a prompt where that has a core."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, forward.spec.vocab, TOKENS).tolist()
    if forward.cores is not None:
        forward.run(tokens)  # the prompt that the core is of
        forward.freeze()
    began = time.perf_counter()
    for token in tokens:
        forward.run([token], outputs=[0])
    took = (time.perf_counter() - began) / TOKENS
    forward.cache.rewind(0)
    return took


def bench_shape(args: argparse.Namespace) -> dict:
    """Dense and sparse decoding of random weights, by turns."""
    spec = shape(args.shape)
    if args.layers:
        spec = replace(spec, layers=args.layers)
    dense_spec = replace(spec, neurons=False)
    config = EngineConfig(args.threads, 64, 32)
    rows = []
    with ExitStack() as stack:
        runs = {"dense": stack.enter_context(closing(Forward(random_weights(dense_spec, "q4"), config)))}
        shares = {}
        for zeros in args.zeros:
            weights = random_weights(spec, "q4")
            planted(weights, zeros)
            name = f"{zeros:.0%} zeros"
            given = replace(config, thresholds=(1.0,) * spec.layers)
            runs[name] = stack.enter_context(closing(Forward(weights, given)))
            runs[name].whole = 0  # the threshold makes the zeros that are planted, from the first token on
            shares[name] = zeros_of(runs[name], [5, 99, 1234])
            if not args.predicted:
                continue
            ranks = (args.rank or spec.width // 8,) * spec.layers
            weights = random_weights(replace(spec, predictors=ranks), "q4")
            foretold(weights, zeros, args.predicted)
            name = f"{name}, {args.predicted * (1 - zeros):.0%} expected"
            runs[name] = stack.enter_context(closing(Forward(weights, replace(given, predict=True))))
            runs[name].whole = 0
            shares[name] = zeros_of(runs[name], [5, 99, 1234])
            read, of = runs[name].gated
            print(f"{name}: {read / of:.1%} of the gates read, rank {ranks[0]}", flush=True)
        for share in args.core:
            weights = random_weights(replace(spec, activation="silu", core=share), "q4")
            name = f"core of {share:.0%}"
            runs[name] = stack.enter_context(closing(Forward(weights, replace(config, predict=True))))
            runs[name].whole = 0
            shares[name] = 1 - share
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name, forward in runs.items():
                took = seconds_per_token(forward)
                if turn:
                    times[name].append(took)
    dense = statistics.median(times["dense"])
    for name, found in times.items():
        middle = statistics.median(found)
        rows.append(
            {
                "run": name,
                "zeros": shares.get(name, 0.0),
                "ms": middle * 1e3,
                "over_dense": dense / middle,
                "least": min(found) * 1e3,
                "most": max(found) * 1e3,
            }
        )
    return {"shape": args.shape, "layers": spec.layers, "threads": args.threads, "rows": rows}


def bench_model(args: argparse.Namespace) -> dict:
    """Greedy generation of a model converted both ways, by turns."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        models = {}
        for name, sparsity in (("dense", "none"), ("sparse", "exact")):
            path = Path(scratch) / f"{name}.ert"
            edgert.convert(args.folder, path, args.quant, sparsity=sparsity)
            models[name] = stack.enter_context(edgert.load(path, threads=args.threads))
        times: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(args.rounds + 1):
            told = set()
            for name, model in models.items():
                done = model.generate("Once upon a time", max_tokens=128)
                told.add(tuple(done.tokens))
                if turn:
                    times[name].append(1 / done.timings.decode_tok_s)
            if len(told) != 1:
                raise SystemExit("the two gave different tokens")
    middle = {name: statistics.median(found) for name, found in times.items()}
    rows = [
        {"run": name, "zeros": 0.0, "ms": middle[name] * 1e3, "over_dense": middle["dense"] / middle[name]}
        | {"least": min(times[name]) * 1e3, "most": max(times[name]) * 1e3}
        for name in middle
    ]
    return {"model": str(args.folder), "quant": args.quant, "threads": args.threads, "rows": rows}


def quality(args: argparse.Namespace) -> dict:
    """Perplexity by share of zeros, and the cost of making up for it."""
    documents = read_documents(args.text, args.last)
    prompts = [document[:40] for document in documents[: args.prompts]]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.ert"
        ways = [(way, share) for way in args.ways for share in args.shares]
        for way, share in [("whole", 0.0), *ways]:
            sparsity = "none" if way == "whole" else share if way == "cats" else f"{way}:{share}"
            edgert.convert(args.folder, path, args.quant, sparsity=sparsity, calibrate=args.calibrate)
            row = {"way": way, "share": share}
            with edgert.load(path, threads=args.threads) as model:
                prompt = args.prompt if way == "core" else 1
                row["perplexity"] = evaluate(model, documents, prompt=prompt).perplexity
                if way == "whole" and "core" in args.ways:
                    row["behind_prompt"] = evaluate(model, documents, prompt=args.prompt).perplexity
            if share:
                row |= corrected(path, prompts, args.threads, share)
            rows.append(row)
            print(row, flush=True)
    return {"model": str(args.folder), "quant": args.quant, "documents": len(documents), "rows": rows}


def corrected(path: Path, prompts: list[str], threads: int, share: float) -> dict:
    """Greedy generation whole, sparse, and sparse and verified: milliseconds per token of each.

    density: of the last, how many of all neurons it reads per token.
    """
    told: dict[str, list] = {}
    times: dict[str, float] = {}
    counts = dict.fromkeys(("drafted", "verifications", "fallback_steps"), 0)
    ways: dict[str, dict] = {"whole": {"sparsity": "none"}, "sparse": {}, "verified": {"draft": "sparse"}}
    for name, options in ways.items():
        with edgert.load(path, threads=threads, **options) as model:
            took = 0.0
            for prompt in prompts:
                done = model.generate(prompt, max_tokens=96)
                told.setdefault(name, []).append(done.tokens)
                took += (len(done.tokens) - 1) / done.timings.decode_tok_s
                for key in counts if name == "verified" else ():
                    counts[key] += done.stats[key]
            times[name] = took / sum(map(len, told[name])) * 1e3
    if told["verified"] != told["whole"]:
        raise SystemExit("what was verified is not what the whole model says")
    same = sum(a == b for a, b in zip(told["sparse"], told["whole"], strict=True))
    tokens = sum(map(len, told["verified"]))
    # A verification reads every neuron once for all its rows, a guess its share (Sirius, section 4).
    read = counts["drafted"] * (1 - share) + counts["verifications"] + counts["fallback_steps"]
    return {"texts_unchanged": f"{same}/{len(prompts)}", "ms": times, "density": read / tokens} | counts


def show(result: dict) -> None:
    """A table for people."""
    print(", ".join(f"{k} {v}" for k, v in result.items() if k != "rows"))
    print("| run | zeros | ms per token | least - most | over dense |\n| --- | ---: | ---: | ---: | ---: |")
    for row in result["rows"]:
        print(
            f"| {row['run']} | {row['zeros']:.1%} | {row['ms']:.3f} | {row['least']:.3f} - {row['most']:.3f} "
            f"| {row['over_dense']:.2f} |"
        )


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-t", "--threads", type=int, default=1)
    common.add_argument("-r", "--rounds", type=int, default=5)
    common.add_argument("--json", type=Path, help="also write the figures there")
    sub = commands.add_parser("shape", parents=[common])
    sub.set_defaults(run=bench_shape)
    sub.add_argument("--shape", default="prosparse-llama-2-7b")
    sub.add_argument("--zeros", type=_numbers, default=[0.85, 0.6])
    sub.add_argument("--predicted", type=float, help="neurons expected, for each that fires; 2.1 or more")
    sub.add_argument("--rank", type=int, help="of the predictors; an eighth of the width by default")
    sub.add_argument("--core", type=_numbers, default=[], help="shares of neurons behind a prompt")
    sub.add_argument("--layers", type=int, help="fewer layers than the shape has")
    sub = commands.add_parser("model", parents=[common])
    sub.set_defaults(run=bench_model)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--quant", choices=("q8", "q4"), default="q4")
    sub = commands.add_parser("quality", parents=[common])
    sub.set_defaults(run=quality)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--quant", choices=("q8", "q4"), default="q8")
    sub.add_argument("--calibrate", type=Path, required=True)
    sub.add_argument("--text", type=Path, required=True)
    sub.add_argument("--last", type=int, default=200)
    sub.add_argument("--prompts", type=int, default=20, help="texts that are gone on with")
    sub.add_argument("--ways", type=lambda t: t.split(","), default=["cats", "teal"], help="or core, skip")
    sub.add_argument("--prompt", type=int, default=64, help="tokens of a text that its core is of")
    sub.add_argument(
        "--shares", type=lambda t: [float(p) for p in t.split(",")], default=[0.25, 0.4, 0.5, 0.6]
    )
    args = parser.parse_args()
    result = args.run(args)
    if args.run is not quality:
        show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
