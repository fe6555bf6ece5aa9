"""Trees priced in expert bytes: the union that rows need, what of it is read, what tree that leaves."""

import numpy as np
import pytest

from edgert.config import EngineConfig
from edgert.experts import ExpertStore
from edgert.flash import Reading, Streaming
from edgert.model.forward import Forward
from edgert.speculation.controller import FIRST_TRIAL, Controller, Steady
from edgert.speculation.decoder import Speculation
from edgert.speculation.expert_reads import ExpertReads, Reads, reads_so_far
from edgert.speculation.lookup import LookupDrafter
from edgert.speculation.tree import Guess, TokenTree
from edgert.speculation.trust import Trust

EXPERTS, ACTIVE, LAYERS, SIZE = 64, 8, 16, 3.5e6
BYTE_S = 1e-9


def unions(rows: int, alike: float, turns: int = 30) -> list[int]:
    """Sizes of the union of so many rows' experts in all layers, where each keeps a share of the first's."""
    rng = np.random.default_rng(rows)
    found = []
    for _ in range(turns):
        total = 0
        for _ in range(LAYERS):
            first = rng.permutation(EXPERTS)[:ACTIVE]
            union = set(first.tolist())
            for _ in range(rows - 1):
                own = rng.permutation(EXPERTS)[:ACTIVE]
                union |= set(np.where(rng.random(ACTIVE) < alike, first, own).tolist())
            total += len(union)
        found.append(total)
    return found


def learned(alike: float, missing: float, sizes: tuple[int, ...] = (1, 6)) -> ExpertReads:
    """After forwards of so many rows, `missing` of whose experts were read."""
    reads = ExpertReads(EXPERTS, ACTIVE, LAYERS, SIZE)
    for rows in sizes:
        for union in unions(rows, alike):
            size = union * missing * SIZE
            reads.observe(rows, Reads(union, size, size * BYTE_S))
    return reads


def test_before_a_tree_was_seen_its_rows_are_taken_for_strangers() -> None:
    reads = learned(0.9, 0.2, sizes=(1,))
    for rows in (2, 4, 8):
        assert reads.union(rows) == pytest.approx(float(np.mean(unions(rows, 0.0))), rel=0.02)


@pytest.mark.parametrize("alike", [0.0, 0.3, 0.7, 1.0])
def test_the_bytes_of_sizes_not_seen_follow_from_the_unions_that_were(alike: float) -> None:
    reads = learned(alike, 0.25)
    for rows in (1, 3, 6, 12):
        expected = float(np.mean(unions(rows, alike))) * 0.25 * SIZE
        assert reads.nbytes(rows) == pytest.approx(expected, rel=0.15)
        assert reads.seconds(rows) == pytest.approx(expected * BYTE_S, rel=0.15)


def test_nothing_is_waited_for_where_all_experts_are_there() -> None:
    reads = learned(0.5, 0.0)
    assert [reads.seconds(rows) for rows in (1, 8, 32)] == [0, 0, 0]


def chain(length: int = 20, surety: float = 0.85) -> TokenTree:
    tree, node = TokenTree(1), 0
    for depth in range(length):
        node = tree.add(node, depth, Guess("test", surety, Trust()))
    return tree


def controller(alike: float, missing: float, compute_s: float = 0.03, row_s: float = 0.001) -> Controller:
    """One whose target takes 30 ms a row to compute, 1 ms for each further one, and what it waits for."""
    made = Controller(["test"])
    made.reads = ExpertReads(EXPERTS, ACTIVE, LAYERS, SIZE)
    for plain, many in zip(unions(1, alike), unions(6, alike), strict=True):
        for rows, union in ((1, plain), (6, many)):
            waited = union * missing * SIZE * BYTE_S
            seconds = compute_s + row_s * (rows - 1) + waited
            reads = Reads(union, union * missing * SIZE, waited)
            if rows == 1:
                made.plain_step(seconds, seconds, reads)
            else:
                made.guessing_step(seconds, 1, rows, seconds, reads)
    return made


def test_the_more_bytes_a_row_brings_the_smaller_is_the_tree() -> None:
    """All rows alike: they need no more than one; strangers: each as much as the first; in between."""
    resident = len(controller(0.0, 0.0).choose(chain(), 64, 0))
    sizes = [len(controller(alike, 0.3).choose(chain(), 64, 0)) for alike in (1.0, 0.9, 0.5, 0.0)]
    assert resident >= sizes[0] > sizes[1] > sizes[2] >= sizes[3]
    unsure = chain(surety=0.6)
    assert len(controller(0.0, 0.0).choose(unsure, 64, 0)) > 3
    assert controller(0.0, 0.3).choose(unsure, 64, 0) == []


def test_guesses_that_cost_more_reading_than_they_save_send_their_drafter_to_rest() -> None:
    for missing, rests in ((0.0, False), (0.5, True)):
        made = controller(0.0, missing)
        for _ in range(FIRST_TRIAL):
            made.settle("test", taken=2, nodes=6, verified=6, draft_s=1e-3)
        assert bool(made.accounts["test"].resting) == rests


def test_prices_of_a_row_hold_the_experts_it_brings() -> None:
    cheap, dear = controller(1.0, 0.3).prices(8), controller(0.0, 0.3).prices(8)
    assert cheap.row < 0.1 < dear.row


def test_what_a_streamed_target_reads_is_seen_step_by_step() -> None:
    """A whole decoder over a streamed target: unions and misses of its forwards reach the controller."""
    from edgert.config import SamplingParams
    from edgert.decoding import TokenSequence
    from edgert.sampling import Sampler
    from edgert.state import Weights
    from tests import kernel_inputs as inputs
    from tests.test_experts import SPEC, Memory, quant_of

    weights = inputs.tiny_weights(SPEC, quant_of, "streamed")
    store = ExpertStore(
        SPEC, weights.tensors, Memory(weights, 2e-4), 8, Streaming(), reading=Reading(2, 4096)
    )
    forward = Forward(Weights(SPEC, weights.data, weights.tensors), EngineConfig(1, 80, 32), store)
    made = Steady(["lookup"], 8)
    decoder = Speculation([LookupDrafter()], made)
    try:
        sequence = TokenSequence(forward)
        params = SamplingParams(max_tokens=30)
        sequence.begin([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], Sampler(params, SPEC.vocab))
        decoder.begin(sequence)
        while len(sequence.tokens) < 40:
            decoder.step(sequence)
        total = reads_so_far(forward)
        assert made.reads is not None
        assert total.asked > 0 and total.nbytes > 0
        assert SPEC.active_experts * 3 <= made.reads.union(1) + 1e-6
        assert made.reads.nbytes(1) > 0
        assert made.forward_s(1) > 0
    finally:
        decoder.close()
        forward.close()
