"""Chooses tokens. Pure: logits and parameters in, a token out.

In order: logit bias, penalties (see penalties.py), temperature, top-k, top-p, min-p, and a draw from what is left.
    temperature  logits are divided by it; 0 takes the largest logit, the lowest id of equals, and draws nothing
    top-k        the k largest logits, of equals the lowest ids: exactly k
    top-p        of those, the smallest set of likeliest tokens whose probability, among those, reaches p: the token
                 that crosses p is kept (Holtzman et al. 2020)
    min-p        of those, the ones at least min_p times as likely as the likeliest (Nguyen et al. 2024)
    draw         the inverse of the cumulative distribution, likeliest token first, equals by rising id, at one
                 uniform number (see randomness.py)

Each of the cuts keeps a prefix of one falling order, and so does the inverse a prefix sum. So candidates are as good as
the whole row, as long as the draw falls within them: the mass of the rest is enough, and the log-sum-exp tells it. It
comes as a float32, so the mass is known to lie in an interval; the candidates decide only where all of the interval
gives the same token, and else ask for the whole row. The same number therefore gives the same token either way.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from stagecoach.errors import ShardFault
from stagecoach.sampling import SamplingParams
from stagecoach_router.sampling.outputs import Candidates, InsufficientCandidates, Sampled, WholeRow
from stagecoach_router.sampling.penalties import TokenCounts, num_lowered, only_lowers, shape_candidates, shape_row
from stagecoach_router.sampling.randomness import uniform

__all__ = ["InsufficientCandidates", "Sampled", "sample"]

_Float32s = npt.NDArray[np.float32]
_Float64s = npt.NDArray[np.float64]

_INSUFFICIENT_CANDIDATES = InsufficientCandidates()

# Smaller temperatures count as this one: two float32 logits either are equal or differ by so much more that nothing
# changes, and (largest possible logit) / temperature is still a float64.
MIN_TEMPERATURE = 1e-30
# Below it, peak / temperature is so large that a float32 log-sum-exp tells nothing of the mass.
_MIN_SCALED_TEMPERATURE = 1e-4
# Error of a scaled log-sum-exp, absolute and per unit of |peak / temperature|, from its arithmetic in float32 (rounding
# unit 6e-8): the exponents' rounding, weighted by their mass, the summing and the logarithm stay below the first;
# rounding the temperature, the quotient and the result are three units of the second.
_LSE_ERROR, _LSE_RELATIVE_ERROR = 1e-5, 2.5e-7
# Of a sum of weights in float64, relative, whatever its order; far more than it is.
_SUM_ERROR = 1e-9
_MAX_EXPONENT = 600.0  # below where exp overflows
# Token ids are int32.
_MAX_VOCAB_SIZE = 2.0**31
# How much of a whole row is ordered at first, and then; a draw beyond that is rare, and only then is all of it.
_PREFIXES = (256, 4096)
# Folding a row to a 64th keeps enough maxima for a close bound of the 256th largest, from a vocabulary of 32k on.
_NUM_FOLDS = 64


def sample(
    output: Candidates | WholeRow,
    params: SamplingParams,
    counts: TokenCounts | None,
    *,
    seed: int,
    completion: int,
    position: int,
) -> Sampled | InsufficientCandidates:
    """The next token of a sequence, exactly as the parameters say, or InsufficientCandidates.

    `seed`, `completion` and `position` choose the random number. From a WholeRow the answer is always a Sampled.
    Raises ShardFault where the logits are not numbers, or contradict each other.
    """
    number = 0.0 if params.greedy else uniform(seed, completion, position)
    if isinstance(output, Candidates):
        return _sample_candidates(output, params, counts, number)
    return _sample_row(output.logits, params, counts, number)


def _sample_candidates(
    output: Candidates, params: SamplingParams, counts: TokenCounts | None, number: float
) -> Sampled | InsufficientCandidates:
    _check_peak(float(output.logits[0]))
    order: npt.NDArray[np.int64] | None = None
    index: int | None = 0
    if counts is not None:
        order, shaped, num_certain = _order_shaped(output, params, counts)
        if num_certain == 0:
            return _INSUFFICIENT_CANDIDATES
        if not params.greedy:
            index = _draw_from_shaped(shaped, num_certain, output, params, counts, number)
    elif not params.greedy:
        index = _draw_from_candidates(output, params, number)
    if index is None:
        return _INSUFFICIENT_CANDIDATES
    if order is not None:
        index = int(order[index])
    token_id = int(output.token_ids[index])
    if params.logprobs is None:
        return Sampled(token_id, None, ())
    assert output.log_sum_exp is not None, "log-probabilities were not asked for with the candidates"
    return _with_logprobs(
        token_id, float(output.logits[index]), output.log_sum_exp, output.token_ids, output.logits, params.logprobs
    )


def _order_shaped(
    output: Candidates, params: SamplingParams, counts: TokenCounts
) -> tuple[npt.NDArray[np.int64], _Float32s, int]:
    """Places among the candidates and shaped logits, falling, [k] each; and how many of them are the row's largest.

    Where shaping only lowers, what is not among the candidates is still at most as large as the last of them was, and
    those that stay above that are the row's largest. Where it may raise, nothing is known.
    """
    shaped = shape_candidates(output.token_ids, output.logits, params, counts)
    order = np.lexsort((output.token_ids, -shaped))
    shaped = shaped[order]
    num_certain = int(np.count_nonzero(shaped > output.logits[-1])) if only_lowers(params) else 0
    return order, shaped, num_certain


def _draw_from_shaped(
    shaped: _Float32s,
    num_certain: int,
    output: Candidates,
    params: SamplingParams,
    counts: TokenCounts,
    number: float,
) -> int | None:
    """The place in `shaped` ([k], falling; the first `num_certain` are the row's largest) of the drawn token, or None.

    Without top-k the mass of the shaped row has to be known. That of its candidates is; tokens outside of them weigh
    what they did before shaping, but for those that it lowered, to anything between that and nothing.
    """
    temperature = max(params.temperature, MIN_TEMPERATURE)
    if params.top_k:
        if num_certain < params.top_k:
            return None
        weights = _weights(shaped[: params.top_k], temperature)
        cumulative = weights.cumsum()
        mass = float(cumulative[-1])
        return _draw(weights, cumulative, mass, mass, params, number)
    sunk = (float(output.logits[0]) - float(shaped[0])) / temperature
    if temperature < _MIN_SCALED_TEMPERATURE or sunk > _MAX_EXPONENT:
        return None
    before = _weights(output.logits, temperature)
    known_before, last = float(before.sum()), float(before[-1])
    least, most = mass_interval(float(output.logits[0]), output.scaled_log_sum_exp, temperature, known_before, last)
    scale = math.exp(sunk)  # both now relative to the largest shaped logit
    weights = _weights(shaped, temperature)
    known = float(weights.sum())
    least = known + scale * max(0.0, least - known_before - last * num_lowered(params, counts))
    most = known + scale * (most - known_before)
    weights = weights[:num_certain]
    return _draw(weights, weights.cumsum(), least * (1 - _SUM_ERROR), most * (1 + _SUM_ERROR), params, number)


def _draw_from_candidates(output: Candidates, params: SamplingParams, number: float) -> int | None:
    """The place among the candidates of the drawn token; None where it may be another one, or beyond them."""
    logits = output.logits
    if len(logits) < params.top_k:
        return None
    if params.top_k:
        logits = logits[: params.top_k]
    temperature = max(params.temperature, MIN_TEMPERATURE)
    weights = _weights(logits, temperature)
    cumulative = weights.cumsum()
    known = float(cumulative[-1])
    if not known >= 1.0:
        raise ShardFault("candidates: a logit is not a number", field="logits", value=known)
    least, most = known, known
    if not params.top_k:
        least, most = mass_interval(
            float(output.logits[0]), output.scaled_log_sum_exp, temperature, known, float(weights[-1])
        )
    return _draw(weights, cumulative, least, most, params, number)


def mass_interval(
    peak_logit: float, scaled_log_sum_exp: float | None, temperature: float, known: float, last: float
) -> tuple[float, float]:
    """Bounds of the mass of the whole row at its temperature, relative to its largest logit's, `peak_logit`.

    known: mass of all candidates. last: that of the last one, which no token outside of them exceeds.
    """
    least, most = known, known + last * _MAX_VOCAB_SIZE
    if scaled_log_sum_exp is None or temperature < _MIN_SCALED_TEMPERATURE:
        return least, most
    peak = peak_logit / temperature
    error = _LSE_ERROR + _LSE_RELATIVE_ERROR * abs(peak)
    log_mass = min(scaled_log_sum_exp - peak, _MAX_EXPONENT)
    upper = math.exp(min(log_mass + error, _MAX_EXPONENT))
    if not upper >= known:
        raise ShardFault(
            "candidates: together they exceed the log-sum-exp of their row", field="logits", limit=upper, value=known
        )
    return max(least, math.exp(log_mass - error)), min(most, upper)


def _sample_row(raw: _Float32s, params: SamplingParams, counts: TokenCounts | None, number: float) -> Sampled:
    """raw: [vocab_size]."""
    logits = raw if counts is None else shape_row(raw, params, counts)
    token_id = int(logits.argmax())  # the first NaN, if there is one
    _check_peak(float(logits[token_id]))
    if not params.greedy:
        token_id = _draw_from_row(logits, params, number)
    if params.logprobs is None:
        return Sampled(token_id, None, ())
    peak = float(raw.max())
    log_sum_exp = peak + math.log(_mass(raw, peak, 1.0))
    top_ids = _largest(raw, max(params.logprobs, 1))
    return _with_logprobs(token_id, float(raw[token_id]), log_sum_exp, top_ids, raw[top_ids], params.logprobs)


def _draw_from_row(logits: _Float32s, params: SamplingParams, number: float) -> int:
    """The drawn token's id. logits: [vocab_size], ordered as far down as the draw falls."""
    temperature = max(params.temperature, MIN_TEMPERATURE)
    if not params.top_k:
        mass = _mass(logits, float(logits.max()), temperature)
        for num in _PREFIXES:
            ids = _largest(logits, num)
            weights = _weights(logits[ids], temperature)
            index = _draw(weights, weights.cumsum(), mass, mass, params, number)
            if index is not None:
                return int(ids[index])
    ids = _largest(logits, params.top_k or len(logits))
    weights = _weights(logits[ids], temperature)
    cumulative = weights.cumsum()
    mass = float(cumulative[-1])
    index = _draw(weights, cumulative, mass, mass, params, number)
    assert index is not None, "number < 1, so it falls short of the last token's end"
    return int(ids[index])


def _draw(
    weights: _Float64s, cumulative: _Float64s, least: float, most: float, params: SamplingParams, number: float
) -> int | None:
    """Where the number falls after top-p and min-p; None where that is beyond what is known, or cannot be told.

    weights: [m], falling, relative to the first; cumulative: their prefix sums; the mass of all tokens, those of
    unknown weight included, is from `least` to `most`.
    """
    m = len(weights)
    if params.top_p < 1.0:
        # The kept mass ends with the token that crosses, known or at most as heavy as the last known one.
        first_cut = int(cumulative.searchsorted(params.top_p * least))
        last_cut = int(cumulative.searchsorted(params.top_p * most)) if most != least else first_cut
        least = float(cumulative[first_cut]) if first_cut < m else max(float(cumulative[-1]), params.top_p * least)
        most = float(cumulative[last_cut]) if last_cut < m else min(most, params.top_p * most + float(weights[-1]))
    if params.min_p > 0.0:
        num_kept = m - int(weights[::-1].searchsorted(params.min_p))
        kept = float(cumulative[num_kept - 1])
        least = min(least, kept)
        if num_kept < m:
            most = min(most, kept)
    index = int(cumulative.searchsorted(number * least, side="right"))
    if least != most and int(cumulative.searchsorted(number * most, side="right")) != index:
        return None
    return index if index < m else None


def _weights(logits: _Float32s, temperature: float) -> _Float64s:
    """exp(logit / temperature) relative to the first, the largest and finite; [m] each. -inf weighs nothing."""
    weights = logits.astype(np.float64)
    weights -= weights[0]
    weights /= temperature
    return np.exp(weights, out=weights)


def _mass(logits: _Float32s, peak: float, temperature: float) -> float:
    """sum(exp((logit - peak) / temperature)) over a whole row."""
    weights = logits.astype(np.float64)
    weights -= peak
    weights /= temperature
    return float(np.exp(weights, out=weights).sum())


def _largest(logits: _Float32s, num: int) -> npt.NDArray[np.int64]:
    """Ids of the `num` >= 1 largest logits above -inf (of all there are, if fewer), falling, equal logits by rising id.

    logits: [vocab_size], no NaN. A bound of the num-th largest comes from the maxima of interleaved parts of the row, a
    fast reduction; what reaches the bound is a little more than `num`, and only that is sorted.
    """
    bound = -math.inf
    width = len(logits) // _NUM_FOLDS
    if 2 * num <= width:
        maxima = logits[: width * _NUM_FOLDS].reshape(_NUM_FOLDS, width).max(axis=0)
        bound = float(np.partition(maxima, width - num)[width - num])
    elif num < len(logits):
        bound = float(np.partition(logits, len(logits) - num)[len(logits) - num])
    ids = np.flatnonzero(logits >= bound if bound > -math.inf else logits > bound)
    # Falling logit and rising id in one integer to sort: many times as fast as a stable argsort of thousands of floats.
    # Read as integers, positive floats keep their order and negative ones have it turned round. Adding 0.0 ends -0.0.
    bits = (logits[ids] + np.float32(0.0)).view(np.int32)
    rising = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    keys = ((~rising).astype(np.int64) << 32) | ids
    keys.sort()
    return keys[:num] & 0xFFFFFFFF


def _with_logprobs(
    token_id: int,
    logit: float,
    log_sum_exp: float,
    top_ids: npt.NDArray[np.integer],
    top_logits: _Float32s,
    num_top: int,
) -> Sampled:
    if not math.isfinite(log_sum_exp):
        raise ShardFault("the log-sum-exp of a row is not a number", field="log_sum_exp", value=log_sum_exp)
    top = zip(top_ids[:num_top].tolist(), top_logits[:num_top].tolist(), strict=True)
    return Sampled(
        token_id,
        logit - log_sum_exp,
        tuple((top_id, value - log_sum_exp) for top_id, value in top if value > -math.inf),
    )


def _check_peak(peak: float) -> None:
    """A row's largest logit, which is NaN if any is, has to be a finite number."""
    if not -math.inf < peak < math.inf:
        raise ShardFault(f"a row of logits has {peak} for its largest", field="logits", value=peak)
