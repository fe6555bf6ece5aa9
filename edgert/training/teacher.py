"""The model that is learned from: loaded by transformers, asked for distributions and residual rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from edgert.config import ModelSpec
from edgert.converters import describe_folder
from edgert.errors import UsageError

MOST_LOGITS = 1 << 26
"""Logits of one pass, at most: 256 MiB as float32, of which a handful are alive at once."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model and where it runs."""

    folder: Path
    spec: ModelSpec
    fingerprint: str  # names its weights (see edgert.converters.exits)
    model: torch.nn.Module
    device: torch.device

    @torch.no_grad()
    def ask(self, ids: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, T, V] after each of ids [B, T], and the residual rows [B, T, D] behind `layers`."""
        out = self.model(ids, output_hidden_states=bool(layers), use_cache=False)
        return out.logits, [out.hidden_states[layer] for layer in layers]

    @torch.no_grad()
    def go_on(self, prompts: Tensor, tokens: int, seed: int) -> Tensor:
        """Continue prompts [B, P] by the model's own samples at temperature 1: ids [B, P + tokens]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        ids, new, past = prompts, prompts, None
        for _ in range(tokens):
            out = self.model(new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            shares = torch.softmax(out.logits[:, -1].float(), -1)
            new = torch.multinomial(shares, 1, generator=generator)
            ids = torch.cat([ids, new], 1)
        return ids

    def rows_at_once(self, tokens: int, most: int) -> int:
        """How many rows of so many tokens one pass may have, `most` at most."""
        return max(1, min(most, MOST_LOGITS // (tokens * self.spec.vocab)))

    def windows(self, documents: Sequence[NDArray[np.int32]], tokens: int) -> Iterator[Tensor]:
        """Documents as ids [1, up to `tokens`], each by itself; a long one in pieces."""
        for document in documents:
            for start in range(0, len(document), tokens):
                piece = document[start : start + tokens].astype(np.int64)
                yield torch.from_numpy(piece)[None].to(self.device)


def load_teacher(folder: Path, device: str | None, threads: int | None) -> Teacher:
    """A Hugging Face folder that edgert can convert, on `device`: None for a GPU where there is one.

    Raises what the converter raises for such a folder, and UsageError for a device that is not there.
    """
    described = describe_folder(folder)
    if threads is not None:
        torch.set_num_threads(threads)
    place = _device(device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
    )
    model = model.requires_grad_(False).eval().to(place)
    return Teacher(folder, described.spec, described.fingerprint, model, place)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError):
        found = "cpu and cuda" if torch.cuda.is_available() else "cpu"
        raise UsageError(f"device is {name!r}, which torch cannot use here; expected {found}") from None
    return place
