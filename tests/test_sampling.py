"""Sampling: definitions, determinism and edges."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.config import SamplingParams
from edgert.errors import ModelFileError, OptionError, UsageError
from edgert.sampling import Choice, Sampler, exp, largest, pick, uniform

GOLDEN_TOKENS = [3, 1, 0, 1, 1, 2, 2, 1, 3, 2, 3, 3, 0, 3, 2, 1]
GOLDEN_UNIFORMS = [0.8720734548204873, 0.0828426870273763, 0.014107696329258346]
LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0], dtype=np.float32)


def sampler(vocab: int = len(LOGITS), **params: object) -> Sampler:
    return Sampler(SamplingParams(**params), vocab)  # type: ignore[arg-type]


def softmax(logits: list[float]) -> list[float]:
    peak = max(logits)
    weights = [math.exp(x - peak) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def reference(
    logits: list[float], params: SamplingParams, prompt: list[int], generated: list[int]
) -> list[float]:
    """The filters of transformers, one after the other, in plain Python."""
    x = list(logits)
    for i in set(prompt) | set(generated):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i in set(generated):
        x[i] -= params.presence_penalty
    x = [v / params.temperature for v in x]
    if params.top_k:
        kth = sorted(x, reverse=True)[min(params.top_k, len(x)) - 1]
        x = [v if v >= kth else -math.inf for v in x]
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    p, total, kept = softmax(x), 0.0, set()
    for i in order:
        kept.add(i)
        total += p[i]
        if total >= params.top_p:
            break
    x = [v if i in kept else -math.inf for i, v in enumerate(x)]
    p = softmax(x)
    return softmax([v if q >= params.min_p * max(p) else -math.inf for v, q in zip(x, p, strict=True)])


def test_greedy_is_the_lowest_of_the_largest() -> None:
    choice = sampler().choose(LOGITS)
    assert choice == Choice(1, choice.logprob, ())
    assert choice.logprob == pytest.approx(math.log(softmax(LOGITS.tolist())[1]))
    assert sampler().distribution(LOGITS).tolist() == [0, 1, 0, 0, 0]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    choice = sampler(logprobs=3, repetition_penalty=9.0, temperature=0.1, top_k=1, seed=0).choose(LOGITS, [1])
    assert choice.token == 3
    raw = [math.log(p) for p in softmax(LOGITS.tolist())]
    assert choice.logprob == pytest.approx(raw[3])
    assert [token for token, _ in choice.top] == [1, 3, 2]
    assert [logprob for _, logprob in choice.top] == pytest.approx([raw[1], raw[3], raw[2]])


def test_penalties_count_the_right_histories() -> None:
    plain = sampler(temperature=1.0).distribution(LOGITS)
    presence = sampler(temperature=1.0, presence_penalty=5.0)
    assert presence.distribution(LOGITS, prompt=[1]).tolist() == plain.tolist()
    assert presence.distribution(LOGITS, generated=[1, 1])[1] < plain[1]
    repetition = sampler(temperature=1.0, repetition_penalty=2.0)
    assert repetition.distribution(LOGITS, prompt=[1, 1])[1] < plain[1]
    assert repetition.distribution(LOGITS, prompt=[4])[4] < plain[4]  # a negative logit falls too


def test_top_k_keeps_ties_and_top_p_at_least_one() -> None:
    assert np.flatnonzero(sampler(temperature=1.0, top_k=1).distribution(LOGITS)).tolist() == [1, 3]
    assert np.flatnonzero(sampler(temperature=1.0, top_p=1e-9).distribution(LOGITS)).tolist() == [1]
    assert np.flatnonzero(sampler(temperature=1.0, min_p=0.3).distribution(LOGITS)).tolist() == [1, 2, 3]


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.3, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
    repetition=st.sampled_from([0.8, 1.0, 1.3]),
    presence=st.sampled_from([-0.5, 0.0, 1.5]),
)
def test_distribution_is_that_of_the_definitions(
    data: st.DataObject,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    presence: float,
) -> None:
    seed = data.draw(st.integers(0, 1 << 32))
    vocab = data.draw(st.integers(1, 20))
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=vocab) * 3).astype(np.float32)  # no two sums fall on an edge
    prompt = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    generated = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=presence,
    )
    found = Sampler(params, vocab).distribution(logits, prompt, generated)
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(reference(logits.tolist(), params, prompt, generated), abs=1e-12)


def test_the_same_seed_gives_the_same_tokens_everywhere() -> None:
    many = sampler(temperature=1.0, seed=7)
    assert [many.choose(LOGITS, generated=[0] * i).token for i in range(16)] == GOLDEN_TOKENS
    assert [uniform(7, i) for i in range(3)] == GOLDEN_UNIFORMS
    assert uniform(-1, 0) == uniform((1 << 64) - 1, 0)


def philox(counter: int, key: int) -> int:
    """The first word of Philox4x64-10, from the paper's definition."""
    mask = (1 << 64) - 1
    c, k = [counter, 0, 0, 0], [key, 0]
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [high >> 64 ^ c[1] ^ k[0], high & mask, low >> 64 ^ c[3] ^ k[1], low & mask]
        k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
    return c[0]


def test_uniform_is_philox() -> None:
    for seed in (0, 7, (1 << 64) - 1):
        assert [uniform(seed, i) for i in range(5)] == [(philox(i + 1, seed) >> 11) / 2**53 for i in range(5)]


def test_a_draw_depends_on_its_place_only() -> None:
    one = sampler(temperature=1.0, seed=3)
    late = one.choose(LOGITS, generated=[1, 2, 3])
    assert sampler(temperature=1.0, seed=3).choose(LOGITS, generated=[2, 2, 2]) == late


def test_without_a_seed_runs_differ_and_can_be_repeated() -> None:
    first, second = sampler(temperature=1.0), sampler(temperature=1.0)
    assert first.seed != second.seed
    again = sampler(temperature=1.0, seed=first.seed)
    draws = [first.choose(LOGITS, generated=[0] * i) for i in range(20)]
    assert [again.choose(LOGITS, generated=[0] * i) for i in range(20)] == draws


def test_frequencies_follow_the_distribution() -> None:
    one = sampler(temperature=1.0, seed=1)
    expected = one.distribution(LOGITS)
    draws = [pick(expected, uniform(1, i)) for i in range(4000)]
    counts = np.bincount(draws, minlength=len(LOGITS))
    spread = np.sqrt(4000 * expected * (1 - expected))
    assert np.all(np.abs(counts - 4000 * expected) < 4 * spread)


def test_pick_never_takes_weight_zero() -> None:
    weights = np.array([0.0, 1.0, 0.0, 3.0, 0.0])
    below_one = 1 - 2**-53
    assert [pick(weights, u) for u in (0.0, 0.2499, 0.25, below_one)] == [1, 1, 3, 3]
    assert pick(np.array([0.1, 0.2, 0.0]), below_one) == 1


def test_masked_tokens_and_extreme_temperatures() -> None:
    masked = np.array([-np.inf, 0.0, -np.inf], dtype=np.float32)
    assert sampler(3, temperature=1.0).distribution(masked).tolist() == [0, 1, 0]
    assert sampler(temperature=1e-308).distribution(LOGITS).tolist() == [0, 0.5, 0, 0.5, 0]
    assert sampler(temperature=1e308).distribution(LOGITS).tolist() == pytest.approx([0.2] * 5)


def test_largest() -> None:
    values = np.array([1.0, 5.0, 5.0, -2.0, 5.0])
    assert [largest(values, n).tolist() for n in (0, 2, 4, 9)] == [[], [1, 2], [1, 2, 4, 0], [1, 2, 4, 0, 3]]


def test_exp_is_accurate() -> None:
    x = -np.concatenate([np.linspace(0, 2, 301), np.linspace(2, 707.9, 300), [1e-300, 708.5, 1e9, np.inf]])
    found = exp(x)
    assert found[0] == 1.0
    assert found[-3:].tolist() == [0, 0, 0]
    for value, result in zip(x[:-3].tolist(), found[:-3].tolist(), strict=True):
        true = math.exp(value)
        assert abs(Fraction(result) - Fraction(true)) <= 2 * Fraction(math.ulp(true))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(ModelFileError, match="for token 2"):
        sampler(temperature=1.0).choose(logits)
    with pytest.raises(ModelFileError, match="-inf for token 0"):
        sampler().choose(np.full_like(LOGITS, -np.inf))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(1, 5\), expected \(5,\)"):
        sampler().choose(LOGITS[None])
    for token in (-1, 5):
        with pytest.raises(UsageError, match=f"{token}.*expected 0 to 4"):
            sampler(presence_penalty=1.0).choose(LOGITS, generated=[token])
    with pytest.raises(OptionError, match="overflow"):
        sampler(repetition_penalty=1e-308).choose(LOGITS * 1e9, prompt=[1])
