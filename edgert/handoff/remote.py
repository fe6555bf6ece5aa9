"""The cloud half, as the decoders see it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.decoding import Commit, Report, TokenSequence
from edgert.errors import LinkError
from edgert.events import Source
from edgert.handoff.link import Link
from edgert.handoff.upper import Failure
from edgert.sampling import Choice

_AHEAD = 32
"""Tokens a cloud with all layers goes on by itself: a round trip is paid once for so many, and at most so
many are computed in vain when the edge stops."""


class CloudUpper:
    """The upper layers over there: rows go up in the background, some are asked about."""

    source: Source = "cloud"

    def __init__(self, link: Link) -> None:
        self._link = link

    def begin(self, sequence: TokenSequence, keep: int) -> None:
        """Tell the cloud which rows still hold."""
        self._link.begin(keep, sequence.sampler, len(sequence.prompt))

    def push(self, first: int, tokens: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """Queue the rows."""
        self._link.push(first, tokens, hidden)

    def answer(self, sequence: TokenSequence) -> Choice | Failure:
        """Ask, and wait."""
        found = self._link.ask(len(sequence.tokens))
        return found if isinstance(found, Failure) else found[0]

    def report(self) -> dict[str, Any]:
        """Traffic and waiting."""
        return link_report(self._link)

    def close(self) -> None:
        """Close the link."""
        self._link.close()


class CloudOnly:
    """A decoder that computes nothing: a cloud with all layers answers. For comparison with the others."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._handoffs = 0

    def begin(self, sequence: TokenSequence) -> Report:
        """Tell the cloud which tokens still hold."""
        self._handoffs = 0
        self._link.begin(sequence.forward.cache.length, sequence.sampler, len(sequence.prompt))
        return lambda: {"exits": 0, "handoffs": self._handoffs, "fallbacks": 0, **link_report(self._link)}

    def prefill(self, sequence: TokenSequence) -> None:
        """Send a chunk of the prompt."""
        self._push(sequence, sequence.forward.config.chunk)

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """Send what is new, and wait for the next token."""
        self._push(sequence, sequence.pending)
        found = self._link.ask(len(sequence.tokens), most=min(_AHEAD, max(1, sequence.wanted)))
        if isinstance(found, Failure):
            raise LinkError(f"{found.text}; in this mode nothing else can answer")
        self._handoffs += len(found)
        return sequence.commit([Commit(choice, "cloud") for choice in found])

    def close(self) -> None:
        """Close the link."""
        self._link.close()

    def _push(self, sequence: TokenSequence, count: int) -> None:
        cache = sequence.forward.cache
        start = cache.length
        self._link.push(start, sequence.tokens[start : start + count], None)
        cache.length += count  # nothing is computed; it says how far the sequence was sent


def link_report(link: Link) -> dict[str, Any]:
    """The numbers of a link since its sequence began."""
    return {
        "bytes_up": link.bytes_up,
        "bytes_down": link.bytes_down,
        "cloud_layer_tokens": link.layer_tokens,
        "link_wait_s": link.wait_s,
        "reconnects": link.reconnects,
        "link_error": link.error,
    }
