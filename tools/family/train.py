"""Train and export the bundled family: tokenizer, target with its dense twin, mixture of experts.

A developer tool; it needs the ``train`` and ``dev`` extras. The runtime itself never imports it. Steps:

    train.py tokenizer --text-dir TEXTS --work-dir WORK
    train.py train base   --text-dir TEXTS --work-dir WORK --steps N     # SiLU, constant rate
    train.py train target --text-dir TEXTS --work-dir WORK --steps M     # from base: ReLU, sparse
    train.py train dense  --text-dir TEXTS --work-dir WORK --steps M     # from base: its dense twin, SiLU
    train.py train moe    --text-dir TEXTS --work-dir WORK --steps K
    train.py export NAME  --work-dir WORK --out FOLDER
    train.py evaluate     --text-dir TEXTS --model FOLDER

The draft and the exits come from ``edgert train``. TEXTS holds ``stories_sampled.jsonl`` and
``tinystories_5k.jsonl``, one ``{"text": ...}`` a line; the last 200 published stories are held out: neither
tokenizer nor weights see them. WORK takes checkpoints; it belongs outside the repository.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from data import PUBLISHED_REPEATS, batch_at, load_texts, token_stream
from model import BOS, EOS, MOE, TARGET, Decoder, Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

SPECIALS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2, as in the Llama family
SHAPES: dict[str, Shape] = {
    "base": TARGET,
    "dense": TARGET,
    "target": replace(TARGET, act="relu"),
    "moe": MOE,
}
WARMUP_STEPS = 60
FINAL_SHARE = 0.02  # of the peak rate; a line to zero wastes its last steps
LONG_SHARE = 0.1  # of the steps, at the end, on rows of full context length
BALANCE_WEIGHT = 0.01  # of the balance loss, as Switch Transformers
PUSH_STEP = 1.03  # factor per step on the weight of the sparsity push
PUSH_LEAST, PUSH_MOST = 1e-3, 3.0

# The generic class: the Llama one would rebuild the tokenizer with its own rules.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
}
GENERATION_CONFIG = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
}


def train_tokenizer(args: argparse.Namespace) -> None:
    """Byte-level BPE: every byte is a token, so nothing is ever unknown."""
    sampled, published, _ = load_texts(args.text_dir)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TARGET.vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sampled + published * PUBLISHED_REPEATS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.work_dir / "tokenizer.json"))


@torch.no_grad()
def held_out_figures(model: torch.nn.Module, tokenizer: Tokenizer, stories: list[str], context: int) -> dict:
    """Perplexity per token and bits per byte; ``</s>`` is predicted, ``<s>`` is not.

    A story longer than the context goes on in a new window that starts with the
    last token of the one before it, so every token is predicted exactly once.
    """
    nats, count = 0.0, 0
    for story in stories:
        ids = torch.tensor([*tokenizer.encode(story).ids, EOS])
        for start in range(0, len(ids) - 1, context - 1):
            window = ids[start : start + context]
            out = model(window[None, :-1])
            logits = (out[0] if isinstance(out, tuple) else out.logits)[0].float()
            nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    size = sum(len(story.encode()) for story in stories)
    return {
        "perplexity": math.exp(nats / count),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": count,
        "bytes": size,
    }


def loss(model: Decoder, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy in nats per token of rows (B T+1); what is pushed down; share of zeros."""
    logits, watched = model(ids[:, :-1])
    value = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).float()
    if model.shape.experts:
        return value, torch.stack(watched).mean(), torch.zeros(())
    zeros = torch.stack([(gated == 0).float().mean() for gated in watched])
    size = torch.stack([gated.float().mean() for gated in watched])
    return value, size.mean(), zeros.mean()


def optimizers(model: Decoder, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (Jordan, 2024), AdamW for embeddings, router and norms."""
    matrices = [
        w
        for name, w in model.named_parameters()
        if w.ndim == 2 and "layers." in name and ".gate." not in name
    ]
    chosen = {id(w) for w in matrices}
    others = [w for w in model.parameters() if id(w) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate_share(name: str, step: int, steps: int) -> float:
    """Of the peak rate: warm-up, then constant for the base; a line down for what ends there."""
    warm = min(1.0, step / WARMUP_STEPS)
    if name == "base":
        return warm
    began = 0.0 if name in ("target", "dense") else 0.4
    done = max(0.0, (step / steps - began) / (1 - began))
    start = 1.0 if name in ("target", "dense") else warm
    return start * (1 - done * (1 - FINAL_SHARE))


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint so that a stop at any moment leaves a whole one."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def restore(args: argparse.Namespace, model: Decoder, parts: list[torch.optim.Optimizer]) -> dict:
    """Fill weights and optimizers from this run's checkpoint or, for a finish, from the base's."""
    own, base = args.work_dir / f"{args.name}.pt", args.work_dir / "base.pt"
    path = own if own.exists() else base if args.name in ("target", "dense") else None
    if path is None:
        return {"step": 0, "seconds": 0.0, "push": PUSH_LEAST, "batches": 0}
    state = torch.load(path)
    model.load_state_dict(state["weights"])
    for part, saved in zip(parts, state["optimizers"], strict=True):
        part.load_state_dict(saved)
    return state if path == own else state | {"step": 0, "push": PUSH_LEAST}


def train(args: argparse.Namespace) -> None:
    """Train NAME to --steps, resuming from WORK/NAME.pt."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.work_dir / "tokenizer.json"))
    stream = token_stream(args.text_dir, tokenizer, args.seed)
    held_out = load_texts(args.text_dir)[2]
    model = Decoder(SHAPES[args.name])
    parts = optimizers(model, args.lr)
    state = restore(args, model, parts)
    push, seconds, batches = state["push"], state["seconds"], state["batches"]
    step_of = torch.compile(loss, dynamic=False) if args.compile else loss
    print(f"{len(stream)} tokens per epoch, from step {state['step']} of {args.steps}", flush=True)
    began, saved, recent = time.monotonic() - seconds, time.monotonic(), []
    for step in range(state["step"] + 1, args.steps + 1):
        long = args.name != "base" and step > args.steps * (1 - LONG_SHARE)
        scale = model.shape.context // args.row_tokens if long else 1
        ids = batch_at(stream, batches, args.rows // scale, args.row_tokens * scale)
        batches += 1
        for part in parts:
            for group in part.param_groups:
                group["lr"] = args.lr * rate_share(args.name, step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            value, pushed, zeros = step_of(model, ids)
        weight = BALANCE_WEIGHT if model.shape.experts else push if args.name == "target" else 0.0
        (value + weight * pushed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in parts:
            part.step()
            part.zero_grad()
        if args.name == "target":  # the push grows while too little is zero, and eases off behind the goal
            push *= (
                PUSH_STEP if zeros.item() < args.zeros * min(1.0, 0.7 + step / args.steps) else 1 / PUSH_STEP
            )
            push = min(max(push, PUSH_LEAST), PUSH_MOST)
        recent.append((value.item(), pushed.item(), zeros.item()))
        if step % 25 == 0:
            means = " ".join(f"{mean:.4f}" for mean in np.mean(recent, axis=0))
            print(
                f"step {step} loss, pushed, zeros {means} push {push:.4g} {time.monotonic() - began:.0f} s",
                flush=True,
            )
            recent.clear()
        if step == args.steps or time.monotonic() - saved > args.report_seconds:
            figures = held_out_figures(model, tokenizer, held_out, model.shape.context)
            print(f"step {step} held out {json.dumps(figures)}", flush=True)
            kept = {"weights": model.state_dict(), "optimizers": [part.state_dict() for part in parts]}
            counts = {"step": step, "push": push, "batches": batches, "seconds": time.monotonic() - began}
            save(args.work_dir / f"{args.name}.pt", kept | counts | {"figures": figures})
            saved = time.monotonic()


def export(args: argparse.Namespace) -> None:
    """Write the model folder, and compare it with transformers' own modules."""
    state = torch.load(args.work_dir / f"{args.name}.pt")
    model = Decoder(SHAPES[args.name])
    model.load_state_dict(state["weights"])
    weights = {name: w.half() for name, w in model.hf_weights().items()}
    documents = {
        "config.json": model.shape.hf_config(),
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "tokenizer.json": json.loads((args.work_dir / "tokenizer.json").read_text("utf-8")),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as holder:
        folder = Path(holder) / args.out.name
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        for name, content in documents.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        _compare(folder, model)
        args.out.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.replace(args.out / file.name)
    print(f"step {state['step']} {state['figures']} -> {args.out}")


@torch.no_grad()
def _compare(folder: Path, model: Decoder) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 3 + 200)[None]
    worst = (theirs(ids).logits - model(ids)[0]).abs().max().item()
    if not worst < 0.1:  # float16 weights against float32 ones
        raise SystemExit(f"transformers computes something else: logits differ by {worst}")
    print(f"transformers agrees: worst logit difference {worst:.4f}, of float16 weights")


def evaluate(args: argparse.Namespace) -> None:
    """Held-out figures of an exported folder, through transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    print(json.dumps(held_out_figures(model, tokenizer, load_texts(args.text_dir)[2], TARGET.context)))


def parse_args() -> argparse.Namespace:
    """The sub-command's arguments; ``run`` is its function."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    texts, work = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    texts.add_argument("--text-dir", type=Path, required=True)
    work.add_argument("--work-dir", type=Path, required=True)
    sub = commands.add_parser("tokenizer", parents=[texts, work])
    sub.set_defaults(run=train_tokenizer)
    sub = commands.add_parser("train", parents=[texts, work])
    sub.set_defaults(run=train)
    sub.add_argument("name", choices=SHAPES)
    sub.add_argument("--steps", type=int, required=True, help="in all, resumed ones included")
    sub.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    sub.add_argument("--rows", type=int, default=16, help="rows per step")
    sub.add_argument("--row-tokens", type=int, default=256)
    sub.add_argument("--zeros", type=float, default=0.84, help="share of zero activations to push to")
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    sub.add_argument("--report-seconds", type=float, default=600, help="between checkpoints")
    sub = commands.add_parser("export", parents=[work])
    sub.set_defaults(run=export)
    sub.add_argument("name", choices=SHAPES)
    sub.add_argument("--out", type=Path, required=True)
    sub = commands.add_parser("evaluate", parents=[texts])
    sub.set_defaults(run=evaluate)
    sub.add_argument("--model", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
