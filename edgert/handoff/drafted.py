"""Hand-over by token, for models that cannot be split: the board's model drafts, the cloud's decides.

Both have the same tokenizer. The board's model guesses a few tokens and sends them as a tree; the cloud
runs the tree in one forward and answers with the tokens that are its own choice, and one more. So the
text is the large model's, and a round trip brings several tokens of it (SpecInfer, Miao et al., 2023,
arXiv:2305.09781, over a network).
"""

import math
from typing import NamedTuple

from edgert.decoding import Commit, Report, TokenSequence
from edgert.handoff.link import Link
from edgert.handoff.remote import link_report
from edgert.handoff.upper import Failure
from edgert.sampling import Choice, largest

_MOST = 8
"""Tokens of a draft's longest branch. The chance that all hold falls with each; past 8 a good draft's next
token is worth less than the time it takes the board."""
_LEAST = 0.1  # probability, as the draft has it, that a branch holds to its end; where less, it ends


class _Draft(NamedTuple):
    """A branch, each of its tokens with the next best beside it."""

    branch: list[Choice]
    tokens: list[int]  # of all nodes
    parents: list[int]


class Drafted:
    """A decoder whose forward is the draft model's, and whose tokens are the cloud's."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._counts = {"exits": 0, "handoffs": 0, "fallbacks": 0, "drafted": 0, "accepted": 0}

    def begin(self, sequence: TokenSequence) -> Report:
        """Tell the cloud which tokens still hold."""
        self._counts = counts = dict.fromkeys(self._counts, 0)
        self._link.begin(sequence.forward.cache.length, sequence.sampler, len(sequence.prompt))
        return lambda: counts | link_report(self._link)

    def prefill(self, sequence: TokenSequence) -> None:
        """A chunk of the prompt through the draft model; the tokens themselves go up at the first step."""
        sequence.run_pending()

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """Draft, and commit what the cloud says; without an answer, the draft's own token, marked."""
        cache, counts, length = sequence.forward.cache, self._counts, len(sequence.tokens)
        self._link.push(self._link.rows, sequence.tokens[self._link.rows :], None)
        draft = self._draft(sequence)
        found = self._link.ask(length, guesses=draft.tokens, parents=draft.parents)
        if isinstance(found, Failure):
            counts["fallbacks"] += 1
            cache.rewind(length)
            return sequence.commit([Commit(draft.branch[0], "model", found.reason)])
        counts["handoffs"] += 1
        counts["drafted"] += len(draft.tokens)
        counts["accepted"] += len(found) - 1
        right = 0  # tokens of the branch that the draft model has computed already
        while right < min(len(found), len(draft.branch)) and found[right].token == draft.branch[right].token:
            right += 1
        cache.rewind(min(cache.length, length + right))
        return sequence.commit([*(Commit(c, "draft") for c in found[:-1]), Commit(found[-1], "cloud")])

    def close(self) -> None:
        """Close the link."""
        self._link.close()

    def _draft(self, sequence: TokenSequence) -> _Draft:
        """The draft model's continuation, as long as it believes in it."""
        forward, length = sequence.forward, len(sequence.tokens)
        if not sequence.pending:  # a step was interrupted: the newest row once more
            forward.cache.rewind(length - 1)
        draft, sure = _Draft([], [], []), 1.0
        # A node needs a position, and the cloud's own token one behind it.
        most = max(1, min(_MOST, forward.cache.limit - length, sequence.wanted - 1))
        logits = sequence.run_pending()
        while logits is not None:
            path = [choice.token for choice in draft.branch]
            choice = sequence.choose(logits, path)
            parent = len(draft.tokens) - 2 if draft.tokens else -1  # the branch's newest node
            beside = next(int(i) for i in largest(logits, 2) if int(i) != choice.token)
            draft.branch.append(choice)
            draft.tokens.extend((choice.token, beside))
            draft.parents.extend((parent, parent))
            sure *= math.exp(choice.logprob)
            if len(draft.branch) == most or sure < _LEAST or choice.token in forward.spec.eos_ids:
                break
            logits = forward.run([choice.token], outputs=[0])[0]
        return draft
