"""Exit heads: what the model would say if it stopped after some of its layers.

Only the heads learn; the model stays as it is. A head is a tuned lens (Belrose et al., 2023,
arXiv:2303.08112; edgert/model/builder.py has the equation), trained towards the model's own final
distribution. Then a temperature makes its confidence mean what it says (Guo et al., 2017,
arXiv:1706.04599): among the tokens of which it is 90 % sure, 90 % should be the model's own choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from edgert.config import ModelSpec
from edgert.converters.exits import MODEL_KEY
from edgert.errors import UsageError
from edgert.format import ExitCalibration
from edgert.format.exits import EXITS_KEY
from edgert.training.corpus import Corpus
from edgert.training.run import Report, Run, Trainer
from edgert.training.teacher import Teacher
from edgert.training.whole import whole_file

BOUNDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Lower bounds of the buckets of confidence: tenths, finer where thresholds are set."""
TEMPERATURES = tuple(2 ** (step / 16) for step in range(-32, 33))
"""Those tried: from a quarter to four, 4 % apart; the loss is flat within that around its least."""


class Head(nn.Module):
    """logits = E rmsnorm(n + W n, output_norm), n = rmsnorm(h, norm); at first the model's own output."""

    def __init__(self, output: Tensor, output_norm: Tensor, eps: float) -> None:
        super().__init__()
        width = output.shape[1]
        self.norm = nn.Parameter(torch.ones(width, device=output.device))
        self.matrix = nn.Parameter(torch.zeros(width, width, device=output.device))
        self.output_norm = nn.Parameter(output_norm.detach().float().clone())
        self._output, self._eps = output.detach(), eps  # a plain tensor: not trained, not saved

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] of residual rows [B, T, D]."""
        n = functional.rms_norm(hidden.float(), hidden.shape[-1:], self.norm, self._eps)
        z = n + functional.linear(n, self.matrix)
        z = functional.rms_norm(z.float(), z.shape[-1:], self.output_norm, self._eps)
        return functional.linear(z, self._output)


def choose_layers(spec: ModelSpec, given: str | None) -> tuple[int, ...]:
    """The layers after which heads sit: as given, "3,5", or about one and two thirds of the depth."""
    if given is None:
        layers = {round(spec.layers / 3), round(2 * spec.layers / 3)}
        return tuple(sorted(layer for layer in layers if 0 < layer < spec.layers))
    try:
        layers = {int(part) for part in given.split(",")}
    except ValueError:
        layers = set()
    if not layers or not all(0 < layer < spec.layers for layer in layers):
        raise UsageError(
            f"--layers is {given!r}; expected numbers from 1 to {spec.layers - 1}, with commas between them"
        )
    return tuple(sorted(layers))


def train_exits(
    teacher: Teacher, corpus: Corpus, layers: tuple[int, ...], run: Run, out: Path, report: Report
) -> dict[int, ExitCalibration]:
    """Train and calibrate heads after `layers` and write them to `out`, a file for `convert --exits`.

    The temperature is fitted on every other held-out document and the agreement counted on the rest.
    Raises UsageError where a checkpoint of another run lies beside `out`.
    """
    spec = teacher.spec
    if spec.layer_norm or spec.logit_cap:
        raise UsageError(
            f"a model of {spec.architecture}, with LayerNorm or capped logits, has no exits; expected RMSNorm"
        )
    if not layers:
        raise UsageError(f"a model of {teacher.spec.layers} layers has no exit; expected at least 2 layers")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UsageError(
            f"-o is {str(out)!r}; expected a name that ends in .safetensors, in a folder there is"
        )
    torch.manual_seed(run.seed)
    heads = _heads(teacher, layers)

    def loss(ids: Tensor) -> Tensor:
        final, hidden = teacher.ask(ids, layers)
        p = functional.log_softmax(final.float(), -1).flatten(0, 1)
        guesses = (head(rows) for head, rows in zip(heads, hidden, strict=True))
        logs = (functional.log_softmax(guess.float(), -1).flatten(0, 1) for guess in guesses)
        losses = [functional.kl_div(q, p, reduction="batchmean", log_target=True) for q in logs]
        return torch.stack(losses).mean()

    def batch(step: int) -> Tensor:
        return torch.from_numpy(corpus.rows(step, run.rows, run.row_tokens)).to(teacher.device)

    settings = asdict(replace(run, steps=0, minutes=None))  # a run may be made longer
    what = {
        "kind": "exits",
        "teacher": teacher.fingerprint,
        "text": corpus.digest,
        "layers": layers,
        **settings,
    }
    at_once = teacher.rows_at_once(run.row_tokens, run.rows)
    trainer = Trainer(heads, loss, batch, run, what, out.with_name(out.name + ".checkpoint"), at_once)
    trainer.train(report)
    found = _calibrate(heads, teacher, corpus, layers, run.row_tokens)
    _write(heads, layers, found, teacher, out)
    trainer.finish()
    return found


def _heads(teacher: Teacher, layers: tuple[int, ...]) -> nn.ModuleList:
    scale = getattr(teacher.model.config, "logits_scaling", 1)  # Granite's; our files have it in the matrix
    output = teacher.model.get_output_embeddings().weight / scale
    norm = teacher.model.get_parameter("model.norm.weight")  # of every architecture that edgert converts
    return nn.ModuleList(Head(output, norm, teacher.spec.norm_eps) for _ in layers)


@torch.no_grad()
def _calibrate(
    heads: nn.ModuleList, teacher: Teacher, corpus: Corpus, layers: tuple[int, ...], row_tokens: int
) -> dict[int, ExitCalibration]:
    documents = corpus.held_out
    if len(documents) == 1:
        half = len(documents[0]) // 2
        documents = (documents[0][:half], documents[0][half:])

    def guesses(part: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The model's choices [T] and each head's logits [T, V]."""
        for ids in teacher.windows(documents[part::2], row_tokens):
            final, hidden = teacher.ask(ids, layers)
            yield final[0].argmax(-1), [h(rows)[0].float() for h, rows in zip(heads, hidden, strict=True)]

    losses = torch.zeros(len(layers), len(TEMPERATURES), dtype=torch.float64)
    for choices, logits in guesses(0):
        for i, guess in enumerate(logits):
            for j, temperature in enumerate(TEMPERATURES):
                losses[i, j] += functional.cross_entropy(guess / temperature, choices, reduction="sum").item()
    best = [TEMPERATURES[j] for j in losses.argmin(-1).tolist()]
    bounds = torch.tensor(BOUNDS)
    tokens = torch.zeros(len(layers), len(BOUNDS), dtype=torch.int64)
    agreed = torch.zeros_like(tokens)
    for choices, logits in guesses(1):
        for i, guess in enumerate(logits):
            confidence = torch.softmax(guess / best[i], -1).amax(-1).cpu()
            bucket = torch.bucketize(confidence, bounds, right=True) - 1
            tokens[i] += torch.bincount(bucket, minlength=len(BOUNDS))
            agreed[i] += torch.bincount(bucket[(guess.argmax(-1) == choices).cpu()], minlength=len(BOUNDS))
    return {
        layer: ExitCalibration(best[i], BOUNDS, tuple(tokens[i].tolist()), tuple(agreed[i].tolist()))
        for i, layer in enumerate(layers)
    }


def _write(
    heads: nn.ModuleList,
    layers: tuple[int, ...],
    found: dict[int, ExitCalibration],
    teacher: Teacher,
    out: Path,
) -> None:
    tensors = {
        f"exits.{layer}.{name}": w.detach().half().cpu().contiguous()
        for layer, head in zip(layers, heads, strict=True)
        for name, w in head.named_parameters()
    }
    calibration = {str(layer): found[layer].to_json() for layer in layers}
    metadata = {EXITS_KEY: json.dumps(calibration), MODEL_KEY: teacher.fingerprint}
    with whole_file(out) as unfinished:
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(0o644)  # safetensors writes for the owner alone
