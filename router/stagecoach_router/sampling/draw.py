"""Where a random number falls among weighted tokens, after top-p and min-p. Works on one row or many alike.

Tokens stand in falling order of their logits. What is known of a row is its first tokens and bounds of the mass of all
of it. Each cut keeps a prefix of the order, and the draw looks up the number in the prefix sums; so the known tokens
are as good as the whole row wherever both bounds give the same token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from stagecoach.errors import ShardFault
from stagecoach.sampling_params import SamplingParams

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

# Smaller temperatures count as this one: two float32 logits either are equal or differ by so much more that nothing
# changes, and (largest possible logit) / temperature is still a float64.
MIN_TEMPERATURE = 1e-30
# Below it, peak / temperature is so large that a float32 log-sum-exp tells nothing of the mass.
MIN_SCALED_TEMPERATURE = 1e-4
MAX_EXPONENT = 600.0  # below where exp overflows
# Error of a scaled log-sum-exp, absolute and per unit of |peak / temperature|, from its arithmetic in float32 (rounding
# unit 6e-8): the exponents' rounding, weighted by their mass, the summing and the logarithm stay below the first;
# rounding the temperature, the quotient and the result are three units of the second.
_LSE_ERROR, _LSE_RELATIVE_ERROR = 1e-5, 2.5e-7
# Token ids are int32.
_MAX_VOCAB_SIZE = 2.0**31


def weights_of(logits: Float32s, temperatures: Sequence[float]) -> Float64s:
    """exp(logit / temperature), relative to the first of the row, which is its largest and finite; [n, m] each.

    A logit of -inf weighs nothing.
    """
    weights = logits.astype(np.float64)
    weights -= _column(logits[:, 0].tolist())
    weights /= _column(temperatures)
    return np.exp(weights, out=weights)


def mass_bounds(
    peak_logit: float, scaled_log_sum_exp: float | None, temperature: float, known: float, last: float
) -> tuple[float, float] | None:
    """The least and the most mass that a whole row has at its temperature, relative to its largest logit's.

    peak_logit: the largest. known: mass of all candidates. last: that of the last one, which no token outside of them
    exceeds. Raises ShardFault where the candidates weigh more than the log-sum-exp says. None: what it says is more
    than could lie outside of them.
    """
    least, most = known, known + last * _MAX_VOCAB_SIZE
    if scaled_log_sum_exp is None or temperature < MIN_SCALED_TEMPERATURE:
        return least, most
    peak = peak_logit / temperature
    error = _LSE_ERROR + _LSE_RELATIVE_ERROR * abs(peak)
    log_mass = min(scaled_log_sum_exp - peak, MAX_EXPONENT)
    upper = math.exp(min(log_mass + error, MAX_EXPONENT))
    if not upper >= known:
        raise ShardFault(
            "candidates: together they exceed the log-sum-exp of their row", field="logits", limit=upper, value=known
        )
    least, most = max(least, math.exp(log_mass - error)), min(most, upper)
    return (least, most) if least <= most else None


def draw(
    weights: Float64s,
    cumulative: Float64s,
    num_known: Sequence[int],
    least: list[float],
    most: list[float],
    params: Sequence[SamplingParams],
    numbers: Sequence[float],
) -> list[int | None]:
    """The place in each of n rows where its number in [0, 1) falls; None where that is not known, or not certain.

    weights: [n, m], falling, relative to the first; cumulative: their prefix sums, [n, m]. Of row i the first
    num_known[i] >= 1 are those of its likeliest tokens, and the mass of all its tokens is from least[i] to most[i].
    """
    top_ps, min_ps = [one.top_p for one in params], [one.min_p for one in params]
    if min(top_ps) < 1.0:
        least, most = _cut_by_top_p(weights, cumulative, num_known, least, most, top_ps)
    if max(min_ps) > 0.0:
        least, most = _cut_by_min_p(weights, cumulative, num_known, least, most, min_ps)
    places = _search(cumulative, [number * mass for number, mass in zip(numbers, least, strict=True)], "right")
    # It is the same place for the most mass, and so for all between, if that falls short of the place's end, too.
    return [
        place if place < known and number * mass < cumulative.item(row, place) else None
        for row, (place, known, number, mass) in enumerate(zip(places, num_known, numbers, most, strict=True))
    ]


def _cut_by_top_p(
    weights: Float64s,
    cumulative: Float64s,
    num_known: Sequence[int],
    least: list[float],
    most: list[float],
    top_ps: Sequence[float],
) -> tuple[list[float], list[float]]:
    """Bounds of the mass that top-p keeps. It ends with the token that crosses p."""
    first_goals = [top_p * mass for top_p, mass in zip(top_ps, least, strict=True)]
    last_goals = [top_p * mass for top_p, mass in zip(top_ps, most, strict=True)]
    first_cuts = _search(cumulative, first_goals, "left")
    last_cuts = first_cuts if most == least else _search(cumulative, last_goals, "left")
    kept_least, kept_most = list(least), list(most)
    for row, top_p in enumerate(top_ps):
        if top_p == 1.0:
            continue
        known, first, last = num_known[row], first_cuts[row], last_cuts[row]
        # A token that crosses and is not known is at most as heavy as the last known one.
        if first < known:
            kept_least[row] = cumulative.item(row, first)
        else:
            kept_least[row] = max(cumulative.item(row, known - 1), first_goals[row])
        if last < known:
            kept_most[row] = cumulative.item(row, last)
        else:
            kept_most[row] = min(most[row], last_goals[row] + weights.item(row, known - 1))
    return kept_least, kept_most


def _cut_by_min_p(
    weights: Float64s,
    cumulative: Float64s,
    num_known: Sequence[int],
    least: list[float],
    most: list[float],
    min_ps: Sequence[float],
) -> tuple[list[float], list[float]]:
    """Bounds of the mass that min-p keeps: of tokens that weigh at least min_p, the first one weighing 1."""
    cuts = _search(-weights, [-min_p for min_p in min_ps], "right")
    kept_least, kept_most = list(least), list(most)
    for row, min_p in enumerate(min_ps):
        if min_p == 0.0:
            continue
        num_kept = min(cuts[row], num_known[row])
        kept = cumulative.item(row, num_kept - 1)
        kept_least[row] = min(least[row], kept)
        if num_kept < num_known[row]:
            kept_most[row] = min(most[row], kept)
    return kept_least, kept_most


def _search(rising: Float64s, values: Sequence[float], side: Literal["left", "right"]) -> list[int]:
    """np.searchsorted of values[i] in rising[i], for each row of [n, m]."""
    if len(values) == 1:
        return [int(rising[0].searchsorted(values[0], side))]
    column = _column(values)
    below = rising < column if side == "left" else rising <= column
    found: list[int] = below.sum(axis=1).tolist()
    return found


def _column(values: Sequence[float]) -> Float64s | float:
    """What gives each row of [n, m] its own value: [n, 1], or for one row the number, which is faster."""
    return values[0] if len(values) == 1 else np.array(values)[:, None]
