"""A draft: a small Llama that guesses what a larger model says, distilled from it.

The loss is the Kullback-Leibler divergence from the teacher's whole distribution (Hinton et al., 2015,
arXiv:1503.02531), over texts and over continuations that the teacher sampled itself, which are what a
draft meets in use (DistillSpec, Zhou et al., 2024, arXiv:2310.08461).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from edgert.config import ModelSpec
from edgert.errors import UsageError
from edgert.training.corpus import Corpus
from edgert.training.run import Report, Run, Trainer
from edgert.training.teacher import Teacher
from edgert.training.whole import told

SHARE = 10
"""A draft has one in so many of its teacher's weights: in the field's reports a draft pays at a fifth to a
fiftieth, smaller ones guess worse and larger ones take too long."""
AT_ONCE = 512  # continuations that are sampled side by side
ROUND_STEPS = 64  # the teacher's own continuations are sampled for so many steps at once
PIECE = 128
"""Tokens of one continuation, a quarter of them the text that is continued. A row is made of several: many
short ones side by side take far less time than few long ones, whose keys are read again for each token."""
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template.jinja"),
)
"""Files of the teacher that hold for the draft too: it speaks the same tokens."""


@dataclass(frozen=True, slots=True)
class DraftShape:
    """The student's dimensions."""

    width: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def parameters(self) -> int:
        """Weights, the embedding (which is also the output) among them."""
        head = self.width // self.heads
        layer = 2 * self.width * self.width + 2 * self.width * self.kv_heads * head
        return self.vocab * self.width + self.layers * (layer + 3 * self.width * self.ffn)


def choose_shape(spec: ModelSpec, width: int | None, layers: int | None, ffn: int | None) -> DraftShape:
    """What was asked for; the rest so that the whole comes to a tenth of the teacher.

    Depth costs a draft more time than width does: each layer is read in turn. So it gets a third of the
    teacher's layers, and width as far as that allows.
    """
    for name, value in (("width", width), ("layers", layers), ("ffn", ffn)):
        if value is not None and (value < 1 or (name == "width" and value % 32)):
            raise UsageError(f"--{name} is {value}; expected a positive number, of width a multiple of 32")
    depth = layers or max(1, round(spec.layers / 3))
    if width is not None:
        return _shape(spec, width, depth, ffn)
    best = _shape(spec, 32, depth, ffn)
    budget = _parameters(spec) / SHARE
    while (wider := _shape(spec, best.width + 32, depth, ffn)).parameters <= budget:
        best = wider
    return best


def _shape(spec: ModelSpec, width: int, layers: int, ffn: int | None) -> DraftShape:
    head = 64 if width >= 256 and width % 64 == 0 else 32
    heads = width // head
    shared = next(n for n in range(max(1, heads // 2), 0, -1) if heads % n == 0)
    return DraftShape(width, layers, ffn or round(2.5 * width / 32) * 32, heads, shared, spec.vocab)


def _parameters(spec: ModelSpec) -> int:
    """Of the teacher, near enough for a share of it: its matrices."""
    attention = 2 * spec.width * (spec.heads + spec.kv_heads) * spec.head_dim
    layer = attention + 3 * spec.width * spec.ffn_width
    return (1 if spec.tied_embeddings else 2) * spec.vocab * spec.width + spec.layers * layer


@dataclass(frozen=True, slots=True)
class DraftReport:
    """How well the draft guesses, on text neither was trained on by this run."""

    parameters: int
    tokens: int  # measured on
    agreement: float  # share where its first choice is the teacher's: what greedy speculation accepts
    acceptance: float  # mean over tokens of sum min(p, q): what sampled speculation accepts, per token
    divergence: float  # KL of the draft from the teacher, nats per token
    perplexity: float  # of the draft on the text
    teacher_perplexity: float


def train_draft(
    teacher: Teacher, corpus: Corpus, shape: DraftShape, run: Run, sampled: float, out: Path, report: Report
) -> DraftReport:
    """Distil a draft into the folder `out`, as transformers lays it out.

    sampled: the share of rows that are continuations by the teacher itself. Raises UsageError where `out`
    holds something, or a checkpoint of another run lies beside it.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(
            f"{out}: found something there, expected a new folder to write; remove it or name another"
        )
    torch.manual_seed(run.seed)
    config = _config(teacher.spec, shape)
    student = LlamaForCausalLM(config).float().to(teacher.device)
    _initialise(student)
    rows = _Rows(teacher, corpus, run, sampled)

    def loss(ids: Tensor) -> Tensor:
        return _divergence(student(ids, use_cache=False).logits, teacher.ask(ids)[0])

    settings = asdict(replace(run, steps=0, minutes=None)) | {"sampled": sampled}  # a run may be made longer
    what = {
        "kind": "draft",
        "teacher": teacher.fingerprint,
        "text": corpus.digest,
        **settings,
        **asdict(shape),
    }
    at_once = teacher.rows_at_once(run.row_tokens, run.rows)
    checkpoint = out.with_name(out.name + ".checkpoint")
    trainer = Trainer(student, loss, rows.batch, run, what, checkpoint, at_once)
    trainer.train(report)
    found = _measure(student.eval(), teacher, corpus, run.row_tokens)
    _write(student, teacher, out, {**settings, "steps": trainer.step, "seconds": trainer.seconds}, found)
    trainer.finish()
    return found


class _Rows:
    """The batches of a run: text, and among it what the teacher made of text."""

    def __init__(self, teacher: Teacher, corpus: Corpus, run: Run, sampled: float) -> None:
        self._teacher, self._corpus, self._run = teacher, corpus, run
        self._own = round(run.rows * sampled)  # rows of a step that are the teacher's own
        self._round, self._pool = -1, torch.empty(0)

    def batch(self, step: int) -> Tensor:
        """The rows of a step; the same for the same step, whatever came before."""
        text = torch.from_numpy(self._corpus.rows(step, self._run.rows, self._run.row_tokens))
        text = text.to(self._teacher.device)
        if not self._own:
            return text
        if step // ROUND_STEPS != self._round:
            self._round = step // ROUND_STEPS
            self._pool = self._sample(self._round)
        at = step % ROUND_STEPS * self._own
        return torch.cat([self._pool[at : at + self._own], text[self._own :]])

    def _sample(self, round_: int) -> Tensor:
        """Rows for all steps of a round: texts of a quarter of PIECE, continued."""
        count, tokens = ROUND_STEPS * self._own, self._run.row_tokens
        piece = min(PIECE, tokens)
        starts = self._corpus.rows(round_, -(-count * tokens // piece), piece)[:, : max(1, piece // 4)]
        parts = torch.from_numpy(starts).to(self._teacher.device).split(AT_ONCE)
        seeds = (round_ * count * tokens + i for i in range(len(parts)))
        new = piece - starts.shape[1]
        pieces = [self._teacher.go_on(part, new, seed) for part, seed in zip(parts, seeds, strict=False)]
        return torch.cat(pieces).reshape(-1)[: count * tokens].reshape(count, tokens)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the student's distributions from the teacher's, mean over tokens, in nats; logits [B, T, V]."""
    q = functional.log_softmax(student.float(), -1).flatten(0, 1)
    p = functional.log_softmax(teacher.float(), -1).flatten(0, 1)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


@torch.no_grad()
def _measure(student: Any, teacher: Teacher, corpus: Corpus, row_tokens: int) -> DraftReport:
    tokens = predicted = 0
    sums = torch.zeros(5, dtype=torch.float64)
    for ids in teacher.windows(corpus.held_out, row_tokens):
        p = functional.log_softmax(teacher.ask(ids)[0][0].float(), -1)
        q = functional.log_softmax(student(ids, use_cache=False).logits[0].float(), -1)
        actual = ids[0, 1:, None]
        tokens, predicted = tokens + len(p), predicted + len(actual)
        sums += torch.tensor(
            [
                (p.argmax(-1) == q.argmax(-1)).sum().item(),
                torch.minimum(p, q).exp().sum().item(),
                (p.exp() * (p - q)).sum().item(),
                -q[:-1].gather(-1, actual).sum().item(),
                -p[:-1].gather(-1, actual).sum().item(),
            ]
        )
    agreement, acceptance, divergence = (sums[:3] / tokens).tolist()
    perplexity, teachers = (sums[3:] / predicted).exp().tolist()
    parameters = sum(w.numel() for w in student.parameters())
    return DraftReport(parameters, tokens, agreement, acceptance, divergence, perplexity, teachers)


def _config(spec: ModelSpec, shape: DraftShape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=spec.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=spec.context,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=spec.bos_id,
        eos_token_id=list(spec.eos_ids) or None,
        dtype="float16",
    )


@torch.no_grad()
def _initialise(student: Any) -> None:
    """Unit-gain matrices; those that write to the residual stream damped by the number of writers."""
    writers = 2 * student.config.num_hidden_layers
    for name, w in student.named_parameters():
        if w.ndim == 1:
            w.fill_(1.0)
        elif "embed" in name:
            w.normal_(std=0.05)
        else:
            w.normal_(std=(w.shape[1] * (writers if "o_proj" in name or "down_proj" in name else 1)) ** -0.5)


def _write(student: Any, teacher: Teacher, out: Path, settings: dict[str, Any], found: DraftReport) -> None:
    """The folder, whole or not at all."""
    weights = {
        name: w.detach().half().cpu().contiguous()
        for name, w in student.named_parameters()  # the output is the embedding: stored once
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with told(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:40]}.") as holder:
        folder = Path(holder) / "draft"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        student.config.save_pretrained(folder)
        for name in COPIED:
            if (teacher.folder / name).is_file():
                shutil.copyfile(teacher.folder / name, folder / name)
        record = {"teacher": teacher.folder.resolve().name, "settings": settings, "held_out": asdict(found)}
        (folder / "distillation.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        if out.exists():
            out.rmdir()
        folder.replace(out)
