"""What generation gives: a stream of token events, and their sum."""

from dataclasses import dataclass, field
from typing import Any, Literal

Source = Literal["model", "draft", "exit", "cloud"]
FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, however it was produced."""

    token: int
    text: str  # what can be shown now: whole characters, none of them part of a stop string
    logprob: float  # natural, of the raw logits
    source: Source = "model"  # who produced it
    top: tuple[tuple[int, float], ...] = ()  # most probable (token, logprob), where asked for
    # An unsure exit that had to answer: "deadline", "link" or "refused" says why the cloud did not.
    fallback: str = ""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a generation went. Rates are NaN-free: 0 where nothing was counted."""

    first_token_s: float  # from the call to the first token
    prefill_tok_s: float  # prompt tokens computed per second
    decode_tok_s: float  # tokens per second after the first


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation."""

    text: str
    tokens: tuple[int, ...]  # generated ids, without the end-of-sequence token
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings
    stats: dict[str, Any] = field(default_factory=dict)  # what the accelerations did
    logprobs: tuple[float, ...] = ()  # of each token
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # where `logprobs` was asked for
