"""Predictors: from what a feed-forward meets to which of its neurons will fire.

Low-rank, one per layer, W_out (W_in x) + b (Deja Vu, Liu et al., 2023, arXiv:2310.17157, section 4.1), wider
where more neurons fire (PowerInfer, Song et al., 2023, arXiv:2312.12456, section 5.1). They begin as the best
copy of the gate that their rank allows, and learn by a cross-entropy in which the neurons that fire weigh as
much as those that do not; the model stays as it is. Then a cut of the scores is chosen on held-out text for
each layer, so that a wanted share of what fires is found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from edgert.config import MOST_RANK, ModelSpec
from edgert.converters.exits import MODEL_KEY
from edgert.converters.neurons import SPARSE_ACTIVATIONS
from edgert.errors import UsageError
from edgert.format.predictors import PREDICTORS_KEY, Predictors
from edgert.model.forward import WHOLE_AT_START
from edgert.training.corpus import Corpus
from edgert.training.run import Report, Run, Trainer
from edgert.training.teacher import Teacher
from edgert.training.whole import whole_file

SINGLE_ROW: float = 1.8
"""What a byte of a row read by itself costs, in bytes of a whole matrix: 24 against 13.3 GB/s on one thread
(docs/sparsity.md). A layer in which predictor and predicted gates cost more than the whole gate gets none."""
BINS: int = 4096
"""Of the histogram of scores that fire, from -MOST_SCORE to MOST_SCORE."""
MOST_SCORE: float = 32.0
SPREAD: float = 2.0
"""Standard deviation of the first scores: certain of a quarter of the neurons, open about the rest."""


class Predictor(nn.Module):
    """Scores [B, T, F] of inputs [B, T, D]: above zero where a neuron is expected to fire."""

    def __init__(self, rank: int, gate: Tensor, x: Tensor) -> None:
        """gate [F, D]: what it is a copy of; x [N, D]: inputs on which it is one.

        Of all products of this rank, the one nearest to W x in the mean over x: a singular value
        decomposition of W C^1/2, C = E[x x^T].
        """
        super().__init__()
        weights = gate.double()
        values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
        root = values.clamp(min=1e-4 * values.max().item()).sqrt()
        u, s, v = torch.linalg.svd(weights @ (vectors * root), full_matrices=False)
        scale = SPREAD / (s.square().sum() / len(weights)).sqrt()  # of what it copies, in the mean
        inner = v[:rank] @ (vectors / root).T
        missing = rank - len(inner)  # of a rank above the width
        self.inner = nn.Parameter(functional.pad(inner, (0, 0, 0, missing)).float())
        self.outer = nn.Parameter(functional.pad(u[:, :rank] * s[:rank] * scale, (0, missing)).float())
        self.bias = nn.Parameter(torch.zeros(len(weights), device=gate.device))

    def forward(self, x: Tensor) -> Tensor:
        """W_out (W_in x) + b."""
        return functional.linear(functional.linear(x, self.inner), self.outer, self.bias)


class Gates:
    """What meets the gates of a teacher and what comes out, layer by layer, as long as it is open."""

    def __init__(self, teacher: Teacher) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []  # [B, T, D] and [B, T, F], of the last forward
        self.mask: Callable[[int, Tensor, Tensor], Tensor] | None = None  # other gates than these
        modules = dict(teacher.model.named_modules())
        names = [f"model.layers.{layer}.mlp.gate_proj" for layer in range(teacher.spec.layers)]
        missing = [name for name in names if name not in modules]
        if missing:
            raise UsageError(f"found no {missing[0]} in the model, expected a gate for each feed-forward")
        self.weights = [modules[name].weight for name in names]  # each [F, D]
        self._hooks = [modules[name].register_forward_hook(self._hook(i)) for i, name in enumerate(names)]

    def _hook(self, layer: int) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if layer == 0:
                self.seen.clear()
            self.seen.append((inputs[0].detach(), output.detach()))
            return None if self.mask is None else self.mask(layer, inputs[0], output)

        return keep

    def close(self) -> None:
        """The model is as it was."""
        for hook in self._hooks:
            hook.remove()


@contextmanager
def _gates_of(teacher: Teacher) -> Iterator[Gates]:
    gates = Gates(teacher)
    try:
        yield gates
    finally:
        gates.close()


def check_model(spec: ModelSpec) -> None:
    """Raise UsageError for a model without neurons that are silent by themselves."""
    other = "experts" if spec.experts else "no gates" if spec.plain_ffn else spec.activation
    if spec.experts or spec.plain_ffn or spec.activation not in SPARSE_ACTIVATIONS or spec.block != "pre":
        raise UsageError(
            f"a model with {other} in {spec.block} blocks has no use for predictors; expected gates with "
            f"{' or '.join(SPARSE_ACTIVATIONS)}"
        )


def choose_ranks(spec: ModelSpec, base: int | None, firing: Sequence[float]) -> tuple[int, ...]:
    """Per layer: `base`, an eighth of the width by default, times how much more fires than in the mean."""
    base, mean = base or spec.width // 8, sum(firing) / len(firing)
    least = min(32, MOST_RANK)
    sizes = (32 * round(base * min(2.0, share / max(mean, 1e-9)) / 32) for share in firing)
    return tuple(max(least, min(size, MOST_RANK)) for size in sizes)


def train_predictor(
    teacher: Teacher,
    corpus: Corpus,
    base: int | None,
    recall: float,
    every: bool,
    run: Run,
    out: Path,
    report: Report,
) -> tuple[tuple[int, ...], Predictors]:
    """Train predictors and write them to `out`, a file for `convert --predictor`: their ranks and worth.

    base: the rank in a layer where as many neurons fire as in the mean. recall: of the neurons that fire,
    the share to be found. Rank 0: the predictor of this layer would cost more than the gate; with `every` it
    is kept all the same.
    Raises UsageError where no layer gets one, and where a checkpoint of another run lies beside `out`.
    """
    spec = teacher.spec
    check_model(spec)
    if not 0.5 <= recall < 1:
        raise UsageError(f"--recall is {recall}; expected a share from 0.5 and below 1, like 0.98")
    if base is not None and not 32 <= base <= MOST_RANK:
        raise UsageError(f"--rank is {base}; expected 32 to {MOST_RANK}")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UsageError(
            f"-o is {str(out)!r}; expected a name that ends in .safetensors, in a folder there is"
        )
    torch.manual_seed(run.seed)
    with _gates_of(teacher) as gates:

        def batch(step: int) -> Tensor:
            return torch.from_numpy(corpus.rows(step, run.rows, run.row_tokens)).to(teacher.device)

        teacher.ask(batch(0))
        firing = [(gate > 0).float().mean().item() for _, gate in gates.seen]
        ranks = choose_ranks(spec, base, firing)
        copied = zip(ranks, gates.weights, gates.seen, strict=True)
        made = [Predictor(rank, gate, x.flatten(0, 1)) for rank, gate, (x, _) in copied]
        predictors = nn.ModuleList(made)

        def loss(ids: Tensor) -> Tensor:
            teacher.ask(ids)
            pairs = zip(made, gates.seen, strict=True)
            return torch.stack([_loss(predictor(x), gate > 0) for predictor, (x, gate) in pairs]).mean()

        settings = asdict(replace(run, steps=0, minutes=None))  # a run may be made longer
        what = {"kind": "predictor", "teacher": teacher.fingerprint, "text": corpus.digest, "ranks": ranks}
        at_once = teacher.rows_at_once(run.row_tokens, run.rows)
        checkpoint = out.with_name(out.name + ".checkpoint")
        trainer = Trainer(predictors, loss, batch, run, what | settings, checkpoint, at_once)
        trainer.train(report)
        found, kept = _calibrate(made, teacher, corpus, gates, recall, every, run.row_tokens)
    _write(made, kept, found, teacher, out)
    trainer.finish()
    return kept, found


def _loss(scores: Tensor, fires: Tensor) -> Tensor:
    """Cross-entropy of scores [B, T, F]; what fires and what does not weigh half each."""
    share = fires.float().mean().clamp(1e-3, 1 - 1e-3)
    weights = torch.where(fires, 0.5 / share, 0.5 / (1 - share))
    return functional.binary_cross_entropy_with_logits(scores.float(), fires.float(), weights)


@torch.no_grad()
def _calibrate(
    made: list[Predictor],
    teacher: Teacher,
    corpus: Corpus,
    gates: Gates,
    recall: float,
    every: bool,
    row_tokens: int,
) -> tuple[Predictors, tuple[int, ...]]:
    """Move every bias so that its layer finds `recall` of what fires, on every other held-out document.

    What that gives is counted on the rest. The ranks are those of the layers in which it pays.
    """
    documents = corpus.held_out
    if len(documents) == 1:
        half = len(documents[0]) // 2
        documents = (documents[0][:half], documents[0][half:])
    fired = torch.zeros(len(made), BINS, dtype=torch.float64)
    for ids in teacher.windows(documents[0::2], row_tokens):
        teacher.ask(ids)
        for i, (predictor, (x, gate)) in enumerate(zip(made, gates.seen, strict=True)):
            scores = predictor(x)[gate > 0].float().cpu()
            fired[i] += torch.histc(scores.clamp(-MOST_SCORE, MOST_SCORE), BINS, -MOST_SCORE, MOST_SCORE)
    for predictor, counts in zip(made, fired, strict=True):
        below = counts.cumsum(0) / counts.sum().clamp(min=1)
        place = int((below <= 1 - recall).sum())  # so many bins hold what may be missed
        predictor.bias -= place * 2 * MOST_SCORE / BINS - MOST_SCORE

    counted = torch.zeros(3, len(made), dtype=torch.float64)  # what fires and is found, is expected, fires
    losses, tokens, neurons = [0.0, 0.0], 0, 0
    ranks: list[int] = []

    def silenced(layer: int, x: Tensor, gate: Tensor) -> Tensor:
        if not ranks[layer]:
            return gate
        expected = made[layer](x) > 0
        expected[:, :WHOLE_AT_START] = True
        return torch.where(expected, gate, -1.0)  # which ReLU makes zero

    for ids in teacher.windows(documents[1::2], row_tokens):
        teacher.ask(ids)
        neurons += gates.seen[0][1].numel()
        for i, (predictor, (x, gate)) in enumerate(zip(made, gates.seen, strict=True)):
            expected, fires = predictor(x) > 0, gate > 0
            both = (expected & fires, expected, fires)
            counted[:, i] += torch.tensor([float(mask.sum()) for mask in both], dtype=torch.float64)
    found, expected, fires = counted.tolist()
    for i, predictor in enumerate(made):
        rank, width, ffn = len(predictor.inner), teacher.spec.width, teacher.spec.ffn_width
        cost = SINGLE_ROW * expected[i] / neurons + rank * (width + ffn) / (width * ffn)
        ranks.append(rank if (cost < 1 or every) and fires[i] else 0)
    if not any(ranks):
        least = min(expected) / max(neurons, 1)
        raise UsageError(
            f"found no layer in which predicting pays: at a recall of {recall} {least:.0%} of the gates and "
            "more are expected to fire; expected a sparser model, or give a lower --recall"
        )
    for ids in teacher.windows(documents[1::2], row_tokens):
        if ids.shape[1] < 2:
            continue
        for which, mask in enumerate((None, silenced)):
            gates.mask = mask
            logits = teacher.ask(ids)[0][0, :-1].float()
            losses[which] += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        gates.mask = None
        tokens += ids.shape[1] - 1
    perplexity = tuple(round(math.exp(min(loss / max(tokens, 1), 60)), 5) for loss in losses)

    def shares(counts: list[float], of: Sequence[float]) -> tuple[float, ...]:
        pairs = zip(counts, of, ranks, strict=True)
        return tuple(round(count / total, 4) if rank else 0.0 for count, total, rank in pairs)

    neurons_of = [neurons] * len(made)
    worth = Predictors(
        (perplexity[0], perplexity[1]),
        shares(found, fires),
        shares(expected, neurons_of),
        shares(fires, neurons_of),
    )
    return worth, tuple(ranks)


def _write(
    made: list[Predictor], ranks: tuple[int, ...], found: Predictors, teacher: Teacher, out: Path
) -> None:
    names = {"inner": "predictor_in", "outer": "predictor_out", "bias": "predictor_out_bias"}
    tensors = {
        f"layers.{layer}.{names[name]}": w.detach().cpu().contiguous()
        for layer, predictor in enumerate(made)
        for name, w in predictor.named_parameters()
        if ranks[layer]
    }
    metadata = {PREDICTORS_KEY: json.dumps(found.to_json()), MODEL_KEY: teacher.fingerprint}
    with whole_file(out) as unfinished:
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(0o644)  # safetensors writes for the owner alone
