"""Routing of rows to experts: who is chosen, with what weight, and how the parts are added."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import routing
from edgert.kernels.reference import routing as routing_twin
from tests import kernel_inputs as inputs

offsets = st.integers(0, 5)


def route_case(
    seed: int, flavour: str, experts: int, active: int, normalized: bool, at: int, shared: bool = True
) -> list[Any]:
    """Arguments of route: logits in a row of whole blocks, and after it the logit of the shared expert."""
    x = inputs.floats((seed, "x"), flavour, at + -(-experts // 16) * 16 + 1, large=200)
    chosen = inputs.whole((seed, "chosen"), -9, -1, at + active + 2)
    weights = inputs.floats((seed, "weights"), "plain", at + active + 3)
    shared_at = x.size - 1 if shared else -1
    return [x, at, x, at, experts, active, False, normalized, shared_at, chosen, at, weights, at]


@st.composite
def route_cases(draw: st.DrawFn) -> list[Any]:
    experts = draw(st.integers(1, 70))
    active = draw(st.integers(1, min(9, experts)))
    return route_case(
        draw(inputs.seeds), draw(inputs.flavours), experts, active, draw(st.booleans()), draw(offsets),
        draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.compiled
@inputs.some
@given(route_cases())
def test_compiled_routing_equals_its_twin(case: list[Any]) -> None:
    ours = [*case[:2], case[0], *case[3:]]
    theirs = [a.copy() if isinstance(a, np.ndarray) else a for a in case]
    theirs[2] = theirs[0]  # the logits are what experts are chosen by
    routing.route(*ours)
    routing_twin.route(*theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.compiled
@inputs.some
@given(route_cases(), st.booleans(), st.sampled_from([-1, routing_twin.UNGATED]))
def test_compiled_routing_by_other_scores_equals_its_twin(
    case: list[Any], sigmoid: bool, shared: int
) -> None:
    case[2], case[6], case[8] = inputs.floats("choice", "mixed", case[0].size), sigmoid, shared
    if sigmoid:
        case[0] = (1 / (1 + np.exp(-np.clip(case[0], -80, 80)))).astype(np.float32)
    inputs.agree(routing.route, routing_twin.route, *case)


def affinity_case(seed: int, flavour: str, experts: int, at: int) -> list[Any]:
    """Arguments of affinities."""
    x = inputs.floats((seed, "x"), flavour, at + -(-experts // 16) * 16 + 1, large=30)
    bias = inputs.uniform((seed, "bias"), experts + 1).view(np.uint8)
    return [x, at, experts, bias, 4, np.zeros(at + experts + 2, np.float32), at]


affinity_cases = st.builds(affinity_case, inputs.seeds, inputs.flavours, st.integers(1, 40), offsets)


@pytest.mark.compiled
@inputs.some
@given(affinity_cases)
def test_compiled_affinities_equal_their_twin(case: list[Any]) -> None:
    inputs.agree(routing.affinities, routing_twin.affinities, *case)


@inputs.some
@given(affinity_cases)
def test_affinities_are_sigmoids_and_the_bias_is_only_in_the_choice(case: list[Any]) -> None:
    x, at, experts, bias, bias_at, y, y_at = case
    before = x.astype(np.float64)
    routing.affinities(*case)
    expected = 1 / (1 + np.exp(-before[at : at + experts]))
    np.testing.assert_allclose(x[at : at + experts], expected, rtol=2e-6, atol=1e-30)
    biases = bias.view(np.float32)[bias_at // 4 :].astype(np.float64)
    np.testing.assert_allclose(y[y_at : y_at + experts], expected + biases, rtol=2e-6, atol=2e-7)


@st.composite
def choice_cases(draw: st.DrawFn) -> list[Any]:
    """Arguments of keep_groups, with ties between groups now and then."""
    groups, size, best = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    at, seed = draw(offsets), draw(inputs.seeds)
    y = inputs.whole(seed, -3, 3, at + groups * size + 2).astype(np.float32) / np.float32(4)
    return [y, at, groups * size, groups, draw(st.integers(1, groups)), best]


@pytest.mark.compiled
@inputs.some
@given(choice_cases())
def test_compiled_choices_of_groups_equal_their_twin(case: list[Any]) -> None:
    inputs.agree(routing.keep_groups, routing_twin.keep_groups, *case)


@inputs.some
@given(choice_cases())
def test_the_best_groups_are_kept_the_lower_of_equal_ones(case: list[Any]) -> None:
    y, at, experts, groups, kept, best = case
    before = y.copy()
    routing.keep_groups(*case)
    size = experts // groups
    parts = [before[at + g * size : at + (g + 1) * size] for g in range(groups)]
    if size >= best:
        scores = [float(np.sort(part)[::-1][:best].sum()) for part in parts]
        wanted = sorted(range(groups), key=lambda g: (-scores[g], g))[:kept]
        for g, part in enumerate(parts):
            found = y[at + g * size : at + (g + 1) * size]
            np.testing.assert_array_equal(found, part if g in wanted else routing_twin.OUT)
    np.testing.assert_array_equal(y[:at], before[:at])
    np.testing.assert_array_equal(y[at + experts :], before[at + experts :])


@inputs.some
@given(route_cases())
def test_the_largest_logits_are_chosen_with_their_probabilities(case: list[Any]) -> None:
    x, at, _, _, experts, active, _, normalized, shared_at, chosen, chosen_at, weights, weights_at = case
    case[2] = x
    logits = [float(v) for v in x[at : at + experts]]
    gate = float(x[shared_at])
    before = weights.copy()
    routing.route(*case)
    expected = sorted(range(experts), key=lambda e: (-logits[e], e))[:active]
    assert chosen[chosen_at : chosen_at + active].tolist() == expected
    odds = [math.exp(max(v - max(logits), -80)) for v in logits]
    total = sum(odds[e] for e in expected) if normalized else sum(odds)
    found = weights[weights_at : weights_at + active]
    np.testing.assert_allclose(found, [odds[e] / total for e in expected], rtol=2e-6, atol=1e-30)
    last = weights_at + active
    if shared_at >= 0:
        assert math.isclose(weights[last], 1 / (1 + math.exp(-max(gate, -80))), rel_tol=2e-6, abs_tol=1e-30)
        last += 1
    np.testing.assert_array_equal(weights[last:], before[last:])


def test_of_equal_experts_the_lowest_is_chosen() -> None:
    x = np.zeros(32, np.float32)
    x[[3, 9, 17]] = 1
    chosen, weights = np.zeros(4, np.int64), np.zeros(4, np.float32)
    routing.route(x, 0, x, 0, 20, 4, False, True, -1, chosen, 0, weights, 0)
    assert chosen.tolist() == [3, 9, 17, 0]


def group_case(seed: int, rows: int, active: int, experts: int) -> list[Any]:
    """Arguments of group: every row chooses different experts, one expert is chosen by none."""
    count = rows * active
    routes = inputs.whole((seed, "routes"), -9, -1, 3 * count + 2 * experts + 4)
    order = inputs.whole((seed, "order"), 0, 10**6, rows, experts)
    order[:, experts // 2] = 10**7
    routes[1 : 1 + count] = np.argsort(order, axis=1)[:, :active].reshape(-1)
    chosen, sources = 1, 1 + count
    places, starts = sources + count, sources + 2 * count
    return [rows, active, experts, routes, chosen, sources, places, starts, starts + experts + 1]


@st.composite
def group_cases(draw: st.DrawFn) -> list[Any]:
    experts = draw(st.integers(2, 20))
    active = draw(st.integers(1, min(6, experts - 1)))
    return group_case(draw(inputs.seeds), draw(st.integers(1, 12)), active, experts)


def used(case: list[Any]) -> tuple[list[int], ...]:
    """sources, places, starts and the busy experts that `group` wrote."""
    rows, active, experts, routes, _, sources, places, starts, busy = case
    spans = ((sources, rows * active), (places, rows * active), (starts, experts + 1))
    held = routes[busy]
    return (*(routes[at : at + n].tolist() for at, n in spans), routes[busy + 1 : busy + 1 + held].tolist())


@pytest.mark.compiled
@inputs.some
@given(group_cases())
def test_compiled_grouping_equals_its_twin(case: list[Any]) -> None:
    other = [a.copy() if isinstance(a, np.ndarray) else a for a in case]
    routing.group(*case)
    routing_twin.group(*other)
    assert used(case) == used(other)


@inputs.some
@given(group_cases())
def test_the_entries_of_an_expert_are_its_rows_in_order(case: list[Any]) -> None:
    rows, active, experts, routes, chosen = case[:5]
    wanted = routes[chosen : chosen + rows * active].tolist()
    routing.group(*case)
    sources, places, starts, busy = used(case)
    assert busy == sorted(set(wanted))
    for e in range(experts):
        expected = [i // active for i, found in enumerate(wanted) if found == e]
        assert sources[starts[e] : starts[e + 1]] == expected
    for i, entry in enumerate(places):
        assert starts[wanted[i]] <= entry < starts[wanted[i] + 1]
        assert sources[entry] == i // active
    assert sorted(places) == list(range(rows * active))


def combine_case(
    seed: int, flavour: str, width: int, active: int, entries: int, at: int, shared: bool = True
) -> list[Any]:
    """Arguments of combine; the row of the shared expert is the one after the entries."""
    x = inputs.floats((seed, "x"), flavour, at + width + 3, large=1e6)
    y = inputs.floats((seed, "y"), flavour, at + (entries + 1) * width, large=1e6)
    routes = inputs.whole((seed, "places"), 0, entries - 1, at + active)
    weights = inputs.uniform((seed, "weights"), at + active + 1)
    shared_at = at + entries * width if shared else -1
    return [x, at, width, y, at, width, routes, at, active, weights, at, shared_at]


combine_cases = st.builds(
    combine_case, inputs.seeds, inputs.flavours, st.sampled_from([16, 64, 80]), st.integers(1, 8),
    st.integers(1, 9), offsets, st.booleans(),
)  # fmt: skip


@pytest.mark.compiled
@inputs.some
@given(combine_cases)
def test_compiled_sum_of_experts_equals_its_twin(case: list[Any]) -> None:
    inputs.agree(routing.combine, routing_twin.combine, *case)


@inputs.some
@given(combine_cases)
def test_the_weighted_rows_are_added(case: list[Any]) -> None:
    x, x_at, width, y, y_at, stride, routes, places, active, weights, weights_at, shared_at = case
    starts = [y_at + int(routes[places + r]) * stride for r in range(active)]
    starts += [shared_at] if shared_at >= 0 else []
    parts = [
        float(weights[weights_at + r]) * y[at : at + width].astype(np.float64) for r, at in enumerate(starts)
    ]
    before = x.copy()
    routing.combine(*case)
    after = before[x_at : x_at + width] + sum(parts)
    size = np.abs(before[x_at : x_at + width]) + sum(np.abs(p) for p in parts)
    assert (np.abs(x[x_at : x_at + width] - after) <= 1e-6 * size + 1e-37).all()
    before[x_at : x_at + width] = x[x_at : x_at + width]
    inputs.same(x, before)
