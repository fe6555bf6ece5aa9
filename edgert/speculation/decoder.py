"""Speculative decoding: a tree of guesses is checked by one forward, and its right branch kept."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.decoding import Commit, Plain, Report, TokenSequence
from edgert.experts import ExpertStore
from edgert.speculation.controller import TIMED, Controller
from edgert.speculation.drafter import Drafter
from edgert.speculation.expert_reads import ExpertReads, reads_so_far
from edgert.speculation.tally import Tally
from edgert.speculation.tree import TokenTree


class Speculation:
    """Each step commits what plain decoding would have, token by token; guesses decide only how fast.

    Verification runs the newest token and the guesses below it as one tree. At every node the sampler
    chooses from the target's own distribution, after all filters, as it would have without a tree; where
    that choice is a child, the child is taken. For guesses that are given, not drawn, this is multi-step
    speculative sampling (SpecInfer, section 4.3, with q = 1): a child is taken with exactly its
    probability, and what is chosen outside the children follows the target's distribution without
    them. Greedy decoding is the case of one choice.
    """

    def __init__(self, drafters: Sequence[Drafter], controller: Controller) -> None:
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self.controller = controller
        self._tree: TokenTree | None = None  # what is left below the newest token
        self._tally = Tally()
        self._unguessed = Plain()
        self._quiet = 0  # plain steps to go before anyone is asked again

    def begin(self, sequence: TokenSequence) -> Report:
        """A new sequence: trees of the old one are of no use, what was learned is."""
        self._tree, self._tally = None, Tally()
        store = sequence.forward.store
        if isinstance(store, ExpertStore) and self.controller.reads is None:
            self.controller.reads = ExpertReads.of(store)
        for drafter in self._drafters.values():
            drafter.begin(sequence)
        tally = self._tally
        return lambda: (
            tally.report() | {"draft": "+".join(self._drafters), "reason": self.controller.reason()}
        )

    def prefill(self, sequence: TokenSequence) -> None:
        """The next chunk."""
        sequence.run_pending()

    def step(self, sequence: TokenSequence) -> list[Commit]:
        """Commit one token or more."""
        if self._quiet:
            self._quiet -= 1
            self._tally.fallback_steps += 1
            return self._plain(sequence) if self._quiet < TIMED else self._unguessed.step(sequence)
        depth = min(sequence.wanted - 1, sequence.forward.cache.limit - len(sequence.tokens))
        asked = self.controller.asked() if depth > 0 else []
        counting = sequence.forward.cores is not None and sequence.prompting
        if sequence.pending > 1 or counting or not (asked or self._tree):
            self._tally.fallback_steps += sequence.pending == 1
            return self._plain(sequence)
        began = time.perf_counter()
        tree = self._tree or TokenTree(sequence.tokens[-1])
        times = self._grow(tree, sequence, asked, depth)
        least = 2 if self.controller.trying(asked) else 0
        nodes = self.controller.choose(tree, depth + 1, least) if asked else []
        grown, drafted = len(tree), time.perf_counter()
        before = reads_so_far(sequence.forward)
        logits = self._run(sequence, tree, nodes, asked)
        verified, reads = time.perf_counter(), reads_so_far(sequence.forward).since(before)
        path, commits = self._accept(sequence, tree, nodes, logits)
        self._settle(sequence, tree, path, commits)
        self._judge(tree, nodes, path, commits, times)
        verify_s, seconds = verified - drafted, time.perf_counter() - began
        if asked:
            self.controller.guessing_step(seconds, len(commits), 1 + len(nodes), verify_s, reads)
        else:
            self.controller.plain_step(seconds, verify_s, reads)
        if self._tree is None:
            self._quiet = self.controller.rest()
        self._tally.count(len(commits), grown - 1, len(nodes), drafted - began, verify_s)
        return commits

    def close(self) -> None:
        """End the drafters."""
        for drafter in self._drafters.values():
            drafter.close()

    def _plain(self, sequence: TokenSequence) -> list[Commit]:
        """A plain step that is timed, so that the controller knows what guessing has to beat."""
        decoding = sequence.pending == 1
        before, began = reads_so_far(sequence.forward), time.perf_counter()
        commits = self._unguessed.step(sequence)
        if decoding:
            reads = reads_so_far(sequence.forward).since(before)
            self.controller.plain_step(time.perf_counter() - began, reads=reads)
        return commits

    def _grow(
        self, tree: TokenTree, sequence: TokenSequence, asked: list[str], depth: int
    ) -> dict[str, tuple[float, float]]:
        """Let the drafters add to the tree; seconds each took for it, and to catch up before."""
        times: dict[str, tuple[float, float]] = {}
        if not asked:
            return times
        controller = self.controller
        prices = controller.prices(depth)
        for name in asked:
            began = time.perf_counter()
            late = self._drafters[name].grow(tree, sequence, prices)
            times[name] = time.perf_counter() - began - late, late
        return times

    def _run(
        self, sequence: TokenSequence, tree: TokenTree, nodes: list[int], asked: list[str]
    ) -> NDArray[np.float32]:
        """Logits [1 + nodes, V] after the root and the chosen nodes, by one forward of the target."""
        forward = sequence.forward
        drafters = [self._drafters[name] for name in asked]
        # Where weights are streamed the target waits for flash, and the drafters guess on meanwhile.
        forward.waits.idle = lambda: any(drafter.extend(tree) for drafter in drafters)
        try:
            if not nodes:
                return forward.run(tree.tokens[:1], outputs=[0])
            row_of = {0: 0} | {node: row for row, node in enumerate(nodes, 1)}
            return forward.run(
                [tree.tokens[node] for node in row_of],
                parents=[-1, *(row_of[tree.parents[node]] for node in nodes)],
                outputs=range(len(row_of)),
            )
        finally:
            forward.waits.idle = None

    def _accept(
        self, sequence: TokenSequence, tree: TokenTree, nodes: list[int], logits: NDArray[np.float32]
    ) -> tuple[list[int], list[Commit]]:
        """Walk down the tree as the target chooses: the nodes that are computed and kept, and the tokens.

        The last token is one that is not computed yet: the target's own, or where the answer ends.
        """
        row_of = {0: 0} | {node: row for row, node in enumerate(nodes, 1)}
        ends, wanted = sequence.forward.spec.eos_ids, sequence.wanted
        path: list[int] = []
        passed: list[int] = []  # their tokens
        commits: list[Commit] = []
        node = 0
        while True:
            choice = sequence.choose(logits[row_of[node]], passed)
            child = tree.children[node].get(choice.token, -1)
            taken = child in row_of
            commits.append(Commit(choice, "draft" if taken else "model"))
            if not taken or choice.token in ends or len(commits) >= wanted:
                break
            path.append(child)
            passed.append(choice.token)
            node = child
        if nodes:
            sequence.forward.keep([row_of[node] for node in (0, *path)])
        return path, sequence.commit(commits)

    def _settle(
        self, sequence: TokenSequence, tree: TokenTree, path: list[int], commits: list[Commit]
    ) -> None:
        """What stands below the newest token is the start of the next tree."""
        last = commits[-1].choice.token
        below = tree.children[path[-1] if path else 0].get(last)
        self._tree, places = (None, {}) if below is None else tree.below(below)
        for drafter in self._drafters.values():
            drafter.settle(tree, path, last, places)

    def _judge(
        self,
        tree: TokenTree,
        nodes: list[int],
        path: list[int],
        commits: list[Commit],
        times: dict[str, tuple[float, float]],
    ) -> None:
        """Tell every guess that was checked whether it was right, and every drafter what it earned."""
        checked, chosen = set(nodes), dict.fromkeys(times, 0)
        taken = dict.fromkeys(times, 0)
        for node, commit in zip((0, *path), commits, strict=True):
            for token, child in tree.children[node].items():
                guess = tree.guesses[child]
                if child in checked and guess is not None:
                    right = token == commit.choice.token
                    guess.trust.observe(guess.stated, right)
                    if right and guess.drafter in taken:
                        taken[guess.drafter] += 1
        for node in nodes:
            guess = tree.guesses[node]
            if guess is not None and guess.drafter in chosen:
                chosen[guess.drafter] += 1
        for name, (seconds, late) in times.items():
            self.controller.settle(name, taken[name], chosen[name], len(nodes), seconds, late)
            self._tally.taken[name] = self._tally.taken.get(name, 0) + taken[name]
