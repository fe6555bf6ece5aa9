"""The loop that both kinds of training share: steps, optimizers, rate, checkpoints, progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgert.errors import UsageError
from edgert.training.whole import whole_file

WARMUP_STEPS = 30
FALL_FROM = 0.4  # of the run: the rate is constant before, and falls on a line after
FINAL_SHARE = 0.02  # of the peak rate; a line to zero wastes its last steps
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05  # of the time may go into checkpoints, where one takes long

Report = Callable[[int, float, float], None]
"""Called after each step: how many are done, the share of the run that is done, and the loss in nats."""


@dataclass(frozen=True, slots=True)
class Run:
    """How long and how a training runs."""

    steps: int  # at most
    minutes: float | None  # at most, over all resumed parts; the same result twice needs steps alone
    rows: int  # per step
    row_tokens: int
    rate: float  # peak learning rate
    seed: int
    half: bool  # bfloat16 products
    compiled: bool  # torch.compile


class Trainer:
    """Trains `module` on the loss of batches; its checkpoint lies beside the output until it is done.

    loss: from ids [B, T] to the mean in nats per token. batch: the ids of a step. what: names the run; a
    checkpoint of another one is refused. `rows_at_once`: rows of a batch that one pass may take.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor], Tensor],
        batch: Callable[[int], Tensor],
        run: Run,
        what: dict[str, Any],
        checkpoint: Path,
        rows_at_once: int,
    ) -> None:
        self._module, self._batch, self._run = module, batch, run
        self._loss = torch.compile(loss, dynamic=False) if run.compiled else loss
        # Through JSON, so that a fresh description equals one that was read back.
        self._what, self._checkpoint, self._rows = json.loads(json.dumps(what)), checkpoint, rows_at_once
        self._optimizers = _optimizers(module, run.rate)
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._restore()

    def train(self, report: Report) -> None:
        """Run to the end. Interrupted, the last checkpoint is whole, and the next call goes on from it."""
        run, began = self._run, time.monotonic() - self.seconds
        saved, pause = time.monotonic(), SAVE_SECONDS
        while (done := self._done()) < 1:
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = run.rate * _rate_share(self.step, done)
            loss = self._take_step(self._batch(self.step))
            self.step, self.seconds = self.step + 1, time.monotonic() - began
            report(self.step, self._done(), loss)
            if time.monotonic() - saved > pause:
                start = time.monotonic()
                self._save()
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, (saved - start) / SAVE_SHARE)
        self._save()  # what follows, measuring and writing, may be stopped too

    def finish(self) -> None:
        """The output is written: the checkpoint is not needed any more."""
        self._checkpoint.unlink(missing_ok=True)

    def _done(self) -> float:
        """The share of the run that is done: the larger of those of its two limits."""
        share = self.step / self._run.steps
        return share if self._run.minutes is None else max(share, self.seconds / (60 * self._run.minutes))

    def _take_step(self, ids: Tensor) -> float:
        total = 0.0
        precision = torch.autocast(ids.device.type, torch.bfloat16) if self._run.half else nullcontext()
        for part in ids.split(self._rows):
            with precision:
                loss = self._loss(part) * (len(part) / len(ids))
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return total

    def _save(self) -> None:
        """Write the checkpoint so that a stop at any moment leaves a whole one."""
        state = {
            "what": json.dumps(self._what),
            "step": self.step,
            "seconds": self.seconds,
            "weights": self._module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        with whole_file(self._checkpoint) as unfinished:
            torch.save(state, unfinished)

    def _restore(self) -> None:
        place = next(self._module.parameters()).device
        try:
            state = torch.load(self._checkpoint, map_location=place, weights_only=True)
            what = json.loads(state["what"])
        except Exception as error:
            raise self._refused(f"found {type(error).__name__} in it") from None
        other = sorted(key for key in what.keys() | self._what.keys() if what.get(key) != self._what.get(key))
        if other:
            raise self._refused(
                f"found one with {other[0]} {what.get(other[0])!r}, not {self._what.get(other[0])!r}"
            )
        self._module.load_state_dict(state["weights"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def _refused(self, found: str) -> UsageError:
        return UsageError(
            f"{self._checkpoint}: {found}, expected the checkpoint of this run; give the same options to go "
            "on with it, or delete it to start anew"
        )


def _optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices (Jordan et al., 2024, kellerjordan.github.io/posts/muon), AdamW for the rest."""
    matrices = [w for name, w in module.named_parameters() if w.ndim == 2 and "embed" not in name]
    chosen = {id(w) for w in matrices}
    others = [w for w in module.parameters() if id(w) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate_share(step: int, done: float) -> float:
    """Of the peak rate: up over the first steps, constant, then down on a line."""
    fall = max(0.0, (done - FALL_FROM) / (1 - FALL_FROM))
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 - fall * (1 - FINAL_SHARE))
