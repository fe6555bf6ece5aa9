"""The texts of the family: which stories are trained on, and in what order they come."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from model import EOS
from tokenizers import Tokenizer
from torch import Tensor

HELD_OUT = 200  # stories at the end of the published file
PUBLISHED_REPEATS = 3  # one published story weighs as much as three sampled ones


def read_stories(path: Path) -> list[str]:
    """The texts of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def load_texts(text_dir: Path) -> tuple[list[str], list[str], list[str]]:
    """Sampled stories, published stories for training, held-out stories."""
    published = read_stories(text_dir / "tinystories_5k.jsonl")
    sampled = read_stories(text_dir / "stories_sampled.jsonl")
    return sampled, published[:-HELD_OUT], published[-HELD_OUT:]


def token_stream(text_dir: Path, tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """All training stories as one uint16 stream ``<s> text </s> <s> ...``, shuffled."""
    sampled, published, _ = load_texts(text_dir)
    encoded = [[*e.ids, EOS] for e in tokenizer.encode_batch(sampled + published)]
    order = np.arange(len(encoded))
    order = np.concatenate([order] + [order[len(sampled) :]] * (PUBLISHED_REPEATS - 1))
    np.random.default_rng(seed).shuffle(order)
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
