"""Decides, step by step, whether guessing pays on this machine and how much of it."""

import math
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

from edgert.speculation.costs import RowCost
from edgert.speculation.drafter import Prices
from edgert.speculation.expert_reads import NONE, ExpertReads, Reads
from edgert.speculation.tree import MAX_NODES, TokenTree

TRIAL = 3
"""Steps after which a drafter that costs more than it brings is sent to rest: fewer would judge it by
one unlucky guess, more would cost what the controller is there to save."""
FIRST_TRIAL = 8
"""Steps of the first trial, which is paid once: three guesses of a draft that is right 6 times in 10 fail all
too often (simulated at a price of 0.45 plain steps, the slowest twentieth of short texts gains 28% instead
of 11%), and its first ones find cold caches."""
FIRST_REST, LONGEST_REST = 16, 1024
"""Plain steps of a rest: doubled each time a trial fails, so that what never pays is asked ever less
(a trial of at most three steps in a thousand), and what pays again is found within one rest."""
MOST_LOST = 0.02
"""Of the plain steps of a rest: what the trial before it may have cost. A bound on what the controller costs
where no guess is ever right."""
SETTLED = 24
"""Steps in a row of a drafter that pays after which its next rest is short again."""
PLAIN_EVERY = 64
"""Steps with guesses between two plain ones, which tell what a plain step takes now: a board that
heats up slows both. Costs about a hundredth of what guessing gains."""
TIMED = 5
"""Plain steps at the end of a rest that are timed, for the median that the trial is held against; the
others are plain decoding and nothing else."""
_SMOOTHING = 0.1
_SIZES = (1, 3, 7, 15, 31)
"""Guesses that with the root fill whole groups of rows."""
_FIRST_SIZE = 6.0
_SLACK = 1.5
"""Of the nodes verified lately: how many are grown with a view to being verified. More than 1, so that a
tree can become larger again."""
_FREE = 0.01
"""Of a plain step: drafting that takes less is not worth judging."""


class Recent:
    """The median of the last few observations: one that was disturbed does not move it."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=TIMED)
        self.value = 0.0

    def observe(self, value: float) -> None:
        """One more observation."""
        self._last.append(value)
        self.value = sorted(self._last)[len(self._last) // 2]

    @property
    def known(self) -> bool:
        """Whether there were enough for a median to mean something."""
        return len(self._last) >= TRIAL


@dataclass(slots=True)
class Account:
    """Whether one drafter earns what it costs, in plain steps; it rests after trials that failed."""

    saved: float = 0.0  # plain steps saved per step it took part in, lately
    steps: int = 0  # steps since the last rest
    resting: int = 0  # plain steps until the next trial
    next_rest: int = FIRST_REST
    trials: int = 0  # that failed, since it last paid
    judged: float = 0.0  # what it saved when it was last sent to rest
    lost: float = 0.0  # plain steps that the trial in progress has cost in all

    def settle(self, saved: float, late: float = 0.0) -> None:
        """It took part in a step and saved so many plain steps; negative: it cost them.

        late: plain steps that catching up took. It is not judged by them, but they are paid.
        """
        self.steps += 1
        self.saved += max(_SMOOTHING, 1 / self.steps) * (saved - self.saved)
        self.lost += late - saved
        if self.steps >= (TRIAL if self.trials else FIRST_TRIAL) and self.saved < 0:
            self.resting = max(self.next_rest, math.ceil(self.lost / MOST_LOST))
            self.next_rest = min(2 * self.next_rest, LONGEST_REST)
            self.steps, self.trials, self.judged, self.lost = 0, self.trials + 1, self.saved, 0.0
        elif self.steps >= SETTLED:
            self.next_rest, self.trials, self.lost = FIRST_REST, 0, 0.0

    def reason(self) -> str:
        """How it stands, for people."""
        if not self.steps and self.trials:
            return f"does not pay here: the last trial cost {-self.judged:.2f} plain steps a step"
        if not self.steps:
            return "not tried yet"
        return f"saves {self.saved:.2f} plain steps a step"


class Controller:
    """Costs and gains measured on the run itself; lives as long as the decoder, over many sequences.

    A second is worth the tokens the machine makes in it now, with guesses or without. A node is grown,
    and verified, where its probability of being taken exceeds what its time is worth: so the tree is
    as large as pays, and no larger.
    """

    def __init__(self, names: list[str], most_nodes: int = MAX_NODES) -> None:
        self.most_nodes = most_nodes
        self.verify = RowCost()  # of the target, without what it waits for experts
        self.reads: ExpertReads | None = None  # where its experts are streamed
        self.plain_s = Recent()  # seconds of a plain step
        self.accounts = {name: Account() for name in names}
        self._guessing_rate = 0.0  # tokens per second of steps with guesses, lately
        self._size = _FIRST_SIZE  # nodes verified in a step, lately
        self._since_plain = 0

    def forward_s(self, rows: int) -> float:
        """Seconds that the target is expected to take for so many rows, and to wait for their experts."""
        waits = self.reads.seconds(rows) if self.reads else 0.0
        return self.verify.seconds(rows) + waits

    def _observe(self, rows: int, seconds: float, reads: Reads) -> None:
        self.verify.observe(rows, max(0.0, seconds - reads.waited_s))
        if self.reads:
            self.reads.observe(rows, reads)

    def asked(self) -> list[str]:
        """The drafters that take part in the next step; none: it is a plain one."""
        if not self.plain_s.known or self._since_plain >= PLAIN_EVERY:
            return []
        return [name for name, account in self.accounts.items() if not account.resting]

    def trying(self, names: list[str]) -> bool:
        """Whether one of them has yet to show that it pays."""
        return any(self.accounts[name].steps < TRIAL for name in names)

    @property
    def rate(self) -> float:
        """Tokens per second that a second is worth: of plain steps, or of guessing if that is faster."""
        plain = 1 / self.plain_s.value if self.plain_s.value > 0 else 0.0
        return max(plain, self._guessing_rate)

    def prices(self, depth: int) -> Prices:
        """What guesses cost in the next step, which can use no level below `depth`.

        A row has the price it has in a tree of the size where rows are cheapest: kernels take them by
        fours and eights, so a fourth can be nearly free. How many nodes are verified is decided, once
        they are grown, by what each number costs.
        """
        one, sizes = self.forward_s(1), [size for size in _SIZES if size < self.most_nodes]
        row_s = min((self.forward_s(1 + size) - one) / size for size in sizes)
        likely = min(self.most_nodes - 1, math.ceil(_SLACK * self._size))
        return Prices(self.rate, self.rate * row_s, depth, self.most_nodes - 1, likely)

    def choose(self, tree: TokenTree, room: int, least: int) -> list[int]:
        """The nodes to verify, without the root, parents first: as many of the most probable as pay.

        room: most rows; least: nodes to verify in any case, so that a drafter on trial is judged.
        """
        ranked = tree.ranked()[: max(0, min(self.most_nodes, room) - 1)]
        gains = accumulate(math.exp(tree.logprobs[node]) for node in ranked)
        rate, count = self.rate, 0
        best = -rate * self.forward_s(1)
        for size, gain in enumerate(gains, 1):
            value = gain - rate * self.forward_s(size + 1)
            if value > best or size <= least:
                best, count = max(best, value), size
        return sorted(ranked[:count])

    def plain_step(self, seconds: float, verify_s: float | None = None, reads: Reads = NONE) -> None:
        """A plain step took so long in all; and its forward, where that was timed apart, and read this."""
        self.plain_s.observe(seconds)
        self._observe(1, seconds if verify_s is None else verify_s, reads)
        self._since_plain = 0

    def rest(self) -> int:
        """Plain steps to go until a drafter is asked again, 0 if one is not resting. They count as taken."""
        steps = min(account.resting for account in self.accounts.values())
        for account in self.accounts.values():
            account.resting -= steps
        return steps

    def guessing_step(
        self, seconds: float, tokens: int, rows: int, verify_s: float, reads: Reads = NONE
    ) -> None:
        """A step with guesses took so long, gave so many tokens, and verified so many rows, which read
        this."""
        self._guessing_rate += _SMOOTHING * (tokens / seconds - self._guessing_rate)
        self._observe(rows, verify_s, reads)
        self._size += _SMOOTHING * (max(2, rows - 1) - self._size)
        self._since_plain += 1
        for account in self.accounts.values():
            account.resting = max(0, account.resting - 1)

    def settle(
        self, name: str, taken: int, nodes: int, verified: int, draft_s: float, late_s: float = 0.0
    ) -> None:
        """Credit a drafter with the tokens taken from its nodes; charge its time and its share of rows."""
        plain = self.plain_s.value
        if plain == 0:
            return
        if not nodes and draft_s < _FREE * plain:
            return  # it had nothing to say, and that cost nothing
        extra = self.forward_s(1 + verified) - self.forward_s(1)
        share = extra * nodes / verified if verified else 0.0
        self.accounts[name].settle(taken - (draft_s + share) / plain, late_s / plain)

    def reason(self) -> str:
        """Why it guesses or does not, in one line."""
        return "; ".join(f"{name}: {account.reason()}" for name, account in self.accounts.items())


class Steady(Controller):
    """Guesses at every step, with the most probable nodes, whether it pays or not: to measure what drafts
    are worth, and to test that none of it changes the output."""

    def asked(self) -> list[str]:
        """All, always."""
        return list(self.accounts)

    @property
    def rate(self) -> float:
        """Time costs nothing."""
        return 0.0

    def prices(self, depth: int) -> Prices:
        """A node that is hardly ever taken is not worth growing even so."""
        return Prices(0.0, 0.01, depth, self.most_nodes - 1, self.most_nodes - 1)

    def choose(self, tree: TokenTree, room: int, least: int) -> list[int]:
        """As many as there may be."""
        return sorted(tree.ranked()[: max(0, min(self.most_nodes, room) - 1)])

    def settle(
        self, name: str, taken: int, nodes: int, verified: int, draft_s: float, late_s: float = 0.0
    ) -> None:
        """Nobody is sent to rest."""
        self.accounts[name].steps += 1

    def reason(self) -> str:
        """See `Controller`."""
        return "told to guess at every step"
