"""From logits to the next token.

A `Sampler` keeps no state between tokens: the i-th generated token is drawn with the i-th
uniform number of the seed, whatever was drawn before. A speculative branch, a resumed answer
and plain decoding therefore choose the same token at the same place.

Order of operations, as in Hugging Face transformers: penalties, temperature, top-k, top-p,
min-p. Each is off at its default.

The choice is the same on every machine for the same logits. Additions, multiplications and
divisions of float64 are correctly rounded everywhere, sums are taken in index order, and the
exponential, which is not the same in every libm, is our own. Reported log-probabilities come from
a compiled sum in float32, which is the same on every machine too.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.config import SamplingParams
from edgert.errors import ModelFileError, OptionError, UsageError
from edgert.kernels.exp_sum import exp_sum
from edgert.kernels.topk import topk

F64 = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
Logits = npt.NDArray[np.floating[Any]]

# ln 2 in two parts (fdlibm's): the high one ends in zero bits, so k times it is exact.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG2_E = 1.4426950408889634
_TAYLOR = tuple(1.0 / math.factorial(n) for n in range(14))
# Values per pass of `exp`: a few arrays of 64 KiB stay in a core's cache. Whole-vocabulary
# temporaries took three times as long; below 2048 the calls themselves begin to count.
_EXP_BLOCK = 8192


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen token; log-probabilities are natural and of the raw logits."""

    token: int
    logprob: float  # log-softmax before penalties and temperature, as OpenAI and vLLM report
    top: tuple[tuple[int, float], ...]  # the most probable (token, logprob), most probable first


class Sampler:
    """Chooses tokens of a vocabulary of `vocab` ids as `params` say.

    `seed` is the one in use: that of `params`, or one drawn from the operating system, which
    repeats the run when given back.
    """

    def __init__(self, params: SamplingParams, vocab: int) -> None:
        self.params = params
        self.vocab = vocab
        self.seed = secrets.randbits(64) if params.seed is None else params.seed

    def distribution(self, logits: Logits, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> F64:
        """Probabilities [V] of the next token after penalties and filters; they sum to 1.

        Args:
            logits: [V], finite or -inf.
            prompt: tokens the model was given; the repetition penalty counts them.
            generated: tokens produced since; both penalties count them.

        Raises ModelFileError when the logits are not numbers, UsageError on a wrong shape or id.
        """
        ids, weights = self._candidates(logits, prompt, generated)
        dense = np.zeros(self.vocab)
        dense[ids] = weights / np.cumsum(weights)[-1]
        return dense

    def choose(self, logits: Logits, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> Choice:
        """The next token; arguments and errors as for `distribution`.

        Greedy is the largest logit, the lowest id among equals. Otherwise it is the inverse of
        the cumulative distribution, in order of token id, at `uniform(seed, len(generated))`.
        """
        ids, weights = self._candidates(logits, prompt, generated)
        if len(ids) == 1:
            token = int(ids[0])
        else:
            token = int(ids[pick(weights, uniform(self.seed, len(generated)))])
        return self._report(logits, token)

    def _candidates(self, logits: Logits, prompt: Sequence[int], generated: Sequence[int]) -> tuple[Ids, F64]:
        """Ids that survive the filters, ascending, and their weights (not normalised)."""
        if logits.shape != (self.vocab,):
            raise UsageError(f"logits have shape {logits.shape}, expected ({self.vocab},)")
        best = int(logits.argmax())  # the first NaN, when there is one
        if not math.isfinite(logits[best]):
            raise ModelFileError(
                f"the model computed the logit {logits[best]} for token {best}, expected finite numbers; "
                "its weights are damaged (see `edgert verify`) or overflow in this precision"
            )
        params = self.params
        if params.repetition_penalty != 1 or params.presence_penalty != 0:
            logits = penalised(logits, params, self._seen(prompt), self._seen(generated))
            best = int(logits.argmax())
            if not math.isfinite(logits[best]):
                raise OptionError("the penalties overflow every logit; give a repetition_penalty near 1")
        if params.temperature == 0:
            return np.array([best], dtype=np.intp), np.ones(1)
        return filtered(logits, float(logits[best]), params)

    def _seen(self, tokens: Sequence[int]) -> Ids:
        """The distinct ids of a history, ascending."""
        seen = np.unique(np.asarray(tokens, dtype=np.intp))
        if len(seen) and not (seen[0] >= 0 and seen[-1] < self.vocab):
            raise UsageError(f"the history holds ids {seen[0]} to {seen[-1]}, expected 0 to {self.vocab - 1}")
        return seen

    def _report(self, logits: Logits, token: int) -> Choice:
        """The choice with its log-probabilities under the raw logits."""
        log_total = _log_total(logits)
        top = tuple((int(i), float(logits[i]) - log_total) for i in largest(logits, self.params.logprobs))
        return Choice(token, float(logits[token]) - log_total, top)


def log_probability(logits: Logits, token: int) -> float:
    """The log-softmax of `token` under logits [V]; ModelFileError when they are not numbers."""
    total = _log_total(logits)
    if not math.isfinite(total):
        raise ModelFileError("the model computed logits that are not numbers; check it with `edgert verify`")
    return float(logits[token]) - total


def _log_total(logits: Logits) -> float:
    """log of the sum of exp(logits)."""
    peak = logits.max()
    return float(peak) + math.log(float(exp_sum(np.ascontiguousarray(logits, np.float32), np.float32(peak))))


def penalised(logits: Logits, params: SamplingParams, prompt: Ids, generated: Ids) -> F64:
    """Logits [V] after the penalties, float64; `prompt` and `generated` hold distinct ids.

    Repetition (CTRL, arXiv:1909.05858, section 4.1, with the sign fix of transformers) divides
    positive and multiplies negative logits of every id seen. Presence (OpenAI, vLLM) is
    subtracted from the ids that were generated.
    """
    result = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # an overflow is reported by the caller
        if params.repetition_penalty != 1:
            seen = np.union1d(prompt, generated)
            values = result[seen]
            penalty = params.repetition_penalty
            result[seen] = np.where(values > 0, values / penalty, values * penalty)
        result[generated] -= params.presence_penalty
    return result


def filtered(logits: Logits, peak: float, params: SamplingParams) -> tuple[Ids, F64]:
    """Ids that survive top-k, top-p and min-p, ascending, and their weights relative to the peak.

    Equal logits at the edge of top-k are all kept, as transformers and vLLM do. Top-p is the
    smallest set, most probable first and lowest id among equals, whose probability reaches p.
    """
    if 0 < params.top_k < len(logits):
        kth = np.partition(logits, len(logits) - params.top_k)[len(logits) - params.top_k]
        ids = np.flatnonzero(logits >= kth)
        scaled = logits[ids].astype(np.float64)
    else:
        ids = np.arange(len(logits))
        scaled = logits.astype(np.float64)
    scaled -= peak
    with np.errstate(over="ignore"):  # a tiny temperature: everything but the peak goes to -inf
        scaled /= params.temperature
    weights = exp(scaled)
    if params.top_p < 1:
        keep = _nucleus(weights, params.top_p)
        ids, weights = ids[keep], weights[keep]
    if params.min_p > 0:
        keep = np.flatnonzero(weights >= params.min_p)  # the peak weighs exactly 1
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _nucleus(weights: F64, p: float) -> Ids:
    """Ascending positions of the smallest set of weights that holds a share p of their sum.

    Sorting a whole vocabulary would cost more than the rest of sampling. Weights below
    (1 - p) / n of the sum hold less than 1 - p together, so none of them is needed (the bound
    is that of llama2.c's sample_topp).
    """
    total = np.cumsum(weights)[-1]
    able = np.flatnonzero(weights >= total * ((1 - p) / len(weights)))
    order = able[np.argsort(-weights[able], kind="stable")]
    needed = int(np.searchsorted(np.cumsum(weights[order]), p * total)) + 1
    return np.sort(order[:needed])


def largest(values: Logits, count: int) -> Ids:
    """Ids of the `count` largest values [V], largest first, lowest id among equals."""
    ids = np.empty(min(count, len(values)), np.int64)
    if len(ids):
        topk(np.ascontiguousarray(values, np.float32), 0, len(values), len(ids), ids)
    return ids


def pick(weights: F64, u: float) -> int:
    """Position of the weight in which the share `u` in [0, 1) of their running sum falls.

    Weights need not be normalised; one of weight zero is never picked.
    """
    running = np.cumsum(weights)
    # u * total can round up to the total itself: the first position there has the last weight.
    last = int(np.searchsorted(running, running[-1]))
    return min(int(np.searchsorted(running, u * running[-1], side="right")), last)


def uniform(seed: int, index: int) -> float:
    """The `index`-th number of a seed, uniform over the multiples of 2**-53 in [0, 1).

    Raw output of Philox4x64-10 (Salmon et al., SC 2011, doi:10.1145/2063384.2063405), keyed by
    the low 64 bits of the seed, at counter `index + 1`. NumPy promises that the raw stream of a bit
    generator never changes; it does not promise that for `Generator.random`.
    """
    raw = np.random.Philox(key=seed & (1 << 64) - 1, counter=index).random_raw()
    return float(int(raw) >> 11) * 2.0**-53


def exp(x: F64) -> F64:
    """e**x for x [N] <= 0, float64, within 2 units in the last place; below e**-708 it is 0.

    x = k ln 2 + r with |r| <= ln 2 / 2, and the Taylor polynomial of degree 13, whose remainder
    at that r is below 2**-57. Only correctly rounded operations, so all machines agree.
    """
    result = np.empty_like(x)
    for start in range(0, len(x), _EXP_BLOCK):
        r = np.maximum(x[start : start + _EXP_BLOCK], -709.0)
        k = np.rint(r * _LOG2_E)
        r -= k * _LN2_HIGH
        r -= k * _LN2_LOW
        series = np.full_like(r, _TAYLOR[-1])
        for coefficient in _TAYLOR[-2::-1]:
            series *= r
            series += coefficient
        k += 1023  # the bias of a float64's exponent: its bits are then those of 2**k
        series *= (k.astype(np.int64) << 52).view(np.float64)
        result[start : start + _EXP_BLOCK] = series
    result[x < -708.0] = 0.0
    return result
