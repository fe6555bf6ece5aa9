"""Train and export the bundled ``stories`` model: tokenizer, weights, figures.

A developer tool; it needs the ``train`` extra (torch, transformers, tokenizers,
safetensors). The runtime itself never imports it. Steps, each a sub-command:

    train_stories.py tokenizer --text-dir TEXTS --work-dir WORK
    train_stories.py train     --text-dir TEXTS --work-dir WORK --steps 5000
    train_stories.py evaluate  --text-dir TEXTS --model edgert/assets/stories
    train_stories.py export    --work-dir WORK --out edgert/assets/stories

TEXTS holds ``stories_sampled.jsonl`` and ``tinystories_5k.jsonl``, one
``{"text": ...}`` a line. The last 200 published stories are held out: neither
the tokenizer nor the weights see them. WORK takes checkpoints and the token
stream; it belongs outside the repository.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SPECIALS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2, as in the Llama family
BOS, EOS = 1, 2
HELD_OUT = 200  # stories at the end of the published file
PUBLISHED_REPEATS = 3  # one published story weighs as much as three sampled ones
WARMUP_STEPS = 150
FINAL_LR_SHARE = 0.02  # of the peak; a cosine to zero wastes its last steps
LONG_SHARE = 0.1  # of the steps, at the end, on rows of full context length

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


@dataclass(frozen=True, slots=True)
class Shape:
    """Model dimensions; the standard letters are in the comments."""

    vocab: int = 4096  # V
    width: int = 128  # D
    layers: int = 6
    heads: int = 4  # H
    kv_heads: int = 2  # K
    head_dim: int = 32  # d
    ffn: int = 384  # F
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    def hf_config(self) -> dict[str, object]:
        """The ``config.json`` from which transformers builds the same model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "max_position_embeddings": self.context,
            "mlp_bias": False,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "vocab_size": self.vocab,
        }


SHAPE = Shape()


def new_model(shape: Shape) -> LlamaForCausalLM:
    """A model with random float32 weights.

    Unit-gain matrices; those that write to the residual stream are damped by
    the number of writers, so that depth does not grow its variance.
    """
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape.hf_config())).float()
    with torch.no_grad():
        for name, w in model.named_parameters():
            if "_proj" in name:
                writers = 2 * shape.layers if "o_proj" in name or "down_proj" in name else 1
                w.normal_(std=(w.shape[1] * writers) ** -0.5)
            elif "embed_tokens" in name:
                w.normal_(std=0.05)
    return model


def loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per token, of rows (B T+1) of token ids."""
    logits = model(ids[:, :-1], use_cache=False).logits  # B T V
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def read_stories(path: Path) -> list[str]:
    """The texts of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def load_texts(text_dir: Path) -> tuple[list[str], list[str], list[str]]:
    """Sampled stories, published stories for training, held-out stories."""
    published = read_stories(text_dir / "tinystories_5k.jsonl")
    sampled = read_stories(text_dir / "stories_sampled.jsonl")
    return sampled, published[:-HELD_OUT], published[-HELD_OUT:]


def train_tokenizer(args: argparse.Namespace) -> None:
    """Byte-level BPE: every byte is a token, so nothing is ever unknown."""
    sampled, published, _ = load_texts(args.text_dir)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab,
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


def token_stream(args: argparse.Namespace, rng: np.random.Generator) -> np.ndarray:
    """All training stories as one uint16 stream ``<s> text </s> <s> ...``, shuffled."""
    tokenizer = Tokenizer.from_file(str(args.work_dir / "tokenizer.json"))
    sampled, published, _ = load_texts(args.text_dir)
    encoded = [[*e.ids, EOS] for e in tokenizer.encode_batch(sampled + published)]
    order = np.arange(len(encoded))
    order = np.concatenate([order] + [order[len(sampled) :]] * (PUBLISHED_REPEATS - 1))
    rng.shuffle(order)
    return np.concatenate([np.array(encoded[i], dtype=np.uint16) for i in order])


def batch_at(stream: np.ndarray, step: int, rows: int, tokens: int) -> Tensor:
    """Rows (B T+1) for one step: consecutive rows, at a fresh offset each epoch.

    Stateless, so that a resumed run sees what an uninterrupted one would have.
    """
    per_epoch = len(stream) // (rows * tokens) - 1
    epoch, index = divmod(step, per_epoch)
    rng = np.random.default_rng([epoch, tokens])
    start = rng.integers(rows * tokens) + rng.permutation(per_epoch)[index] * rows * tokens
    starts = start + np.arange(rows)[:, None] * tokens
    return torch.from_numpy(stream[starts + np.arange(tokens + 1)].astype(np.int64))


@torch.no_grad()
def held_out_figures(model: LlamaForCausalLM, tokenizer: Tokenizer, stories: list[str]) -> dict[str, float]:
    """Perplexity per token and bits per byte; ``</s>`` is predicted, ``<s>`` is not.

    A story longer than the context goes on in a new window that starts with the
    last token of the one before it, so every token is predicted exactly once.
    """
    nats, count, context = 0.0, 0, SHAPE.context
    for story in stories:
        ids = torch.tensor([*tokenizer.encode(story).ids, EOS])
        for start in range(0, len(ids) - 1, context - 1):
            window = ids[start : start + context]
            logits = model(window[None, :-1], use_cache=False).logits[0].float()
            nats += functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    size = sum(len(story.encode()) for story in stories)
    return {
        "perplexity": math.exp(nats / count),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": count,
        "bytes": size,
    }


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up to ``--lr``, then a cosine to its small final share."""
    warm = min(1.0, step / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return args.lr * warm * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def adamw(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Decay on the matrices only: norms and embeddings carry scale, not mixing."""
    matrices = [w for name, w in model.named_parameters() if "_proj" in name]
    others = [w for name, w in model.named_parameters() if "_proj" not in name]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint so that a stop at any moment leaves a whole one."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


def restore(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Fill weights and optimizer from a checkpoint; its step and seconds, or zeros without one."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path)
    # Not strict: the checkpoint leaves out the output matrix, which is the embedding.
    model.load_state_dict(state["weights"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def train(args: argparse.Namespace) -> None:
    """Train to ``--steps``, resuming from WORK/last.pt; a changed --steps rescales the cosine."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stream = token_stream(args, np.random.default_rng(args.seed))
    tokenizer = Tokenizer.from_file(str(args.work_dir / "tokenizer.json"))
    held_out = load_texts(args.text_dir)[2]
    model = new_model(SHAPE)
    optimizer = adamw(model)
    path = args.work_dir / "last.pt"
    first, seconds = restore(path, model, optimizer)
    loss_of = torch.compile(loss, dynamic=False) if args.compile else loss
    print(f"{len(stream)} tokens per epoch, from step {first} of {args.steps}", flush=True)
    began, reported, recent = time.monotonic() - seconds, time.monotonic(), []
    for step in range(first + 1, args.steps + 1):
        scale = SHAPE.context // args.row_tokens if step > args.steps * (1 - LONG_SHARE) else 1
        ids = batch_at(stream, step - 1, args.rows // scale, args.row_tokens * scale)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            value = loss_of(model, ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(value.item())
        if step % 50 == 0:
            elapsed = time.monotonic() - began
            print(f"step {step} loss {np.mean(recent):.4f} {elapsed:.0f} s", flush=True)
            recent.clear()
        if step == args.steps or time.monotonic() - reported > args.report_seconds:
            reported = time.monotonic()
            figures = held_out_figures(model, tokenizer, held_out)
            print(f"step {step} held out {json.dumps(figures)}", flush=True)
            weights = dict(model.named_parameters())  # the tied matrix once
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "step": step}
            save(path, state | {"seconds": time.monotonic() - began, "figures": figures})


def export(args: argparse.Namespace) -> None:
    """Write the model folder; each file, or a new folder as a whole, appears at once."""
    state = torch.load(args.work_dir / "last.pt")
    weights = {name: w.detach().half() for name, w in state["weights"].items()}
    documents = {
        "config.json": SHAPE.hf_config(),
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
        if not args.out.exists():
            folder.replace(args.out)
        else:
            for file in folder.iterdir():
                file.replace(args.out / file.name)
    print(f"step {state['step']} {state['figures']} -> {args.out}")


def evaluate(args: argparse.Namespace) -> None:
    """Held-out figures of an exported folder, through transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    held_out = load_texts(args.text_dir)[2]
    print(json.dumps(held_out_figures(model, tokenizer, held_out)))


def parse_args() -> argparse.Namespace:
    """The sub-command's arguments; ``run`` is its function."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(function: Callable[[argparse.Namespace], None], *folders: str) -> argparse.ArgumentParser:
        doc = (function.__doc__ or "").splitlines()[0]
        sub = commands.add_parser(function.__name__.removeprefix("train_"), help=doc)
        sub.set_defaults(run=function)
        for folder in folders:
            sub.add_argument(folder, type=Path, required=True)
        return sub

    command(train_tokenizer, "--text-dir", "--work-dir")
    sub = command(train, "--text-dir", "--work-dir")
    sub.add_argument("--steps", type=int, required=True, help="in all, resumed ones included")
    sub.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    sub.add_argument("--rows", type=int, default=16, help="rows per step")
    sub.add_argument("--row-tokens", type=int, default=256)
    sub.add_argument("--seed", type=int, default=1)
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--bf16", action="store_true", help="bfloat16 matrix products")
    sub.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    sub.add_argument("--report-seconds", type=float, default=240, help="held-out interval")
    command(export, "--work-dir", "--out")
    command(evaluate, "--text-dir", "--model")
    return parser.parse_args()


def main() -> None:
    """Run the sub-command."""
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
