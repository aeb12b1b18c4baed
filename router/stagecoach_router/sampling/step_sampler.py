"""Chooses the tokens of all rows of a step at once, where that gives what `sample` gives for each of them. Pure.

Two kinds of rows make up nearly all there are, and cost a fraction of `sample` when their arrays are worked on
together: those whose token is the likeliest candidate, and those that draw from the candidates as they came, without
bias, penalties or log-probabilities. The arithmetic is that of sampler.py, in the same order and precision, so tokens
do not depend on which way they were chosen. Everything else, and every row that is not as it should be, is `sample`'s.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stagecoach.errors import ShardFault
from stagecoach.sampling import SamplingParams
from stagecoach_router.sampling.outputs import CandidateRows, InsufficientCandidates, Sampled, WholeRows
from stagecoach_router.sampling.penalties import TokenCounts
from stagecoach_router.sampling.randomness import uniform
from stagecoach_router.sampling.sampler import MIN_TEMPERATURE, mass_interval, sample

# Fewer rows are drawn faster one by one.
MIN_ROWS_TO_DRAW = 4

Choice = Sampled | InsufficientCandidates | ShardFault

_Float64s = npt.NDArray[np.float64]


class SampledRow(Protocol):
    """What choosing a sequence's next token needs to know of it."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def counts(self) -> TokenCounts | None: ...  # None: neither bias nor penalties
    @property
    def seed(self) -> int: ...
    @property
    def index(self) -> int: ...  # which of its request's completions
    @property
    def num_tokens(self) -> int: ...  # and so the position of the next one


def choose_token(outputs: CandidateRows | WholeRows, index: int, row: SampledRow) -> Choice:
    """The token for row `index`, by itself. A row that is at fault is answered with its error."""
    try:
        return sample(
            outputs[index],
            row.params,
            row.counts,
            seed=row.seed,
            completion=row.index,
            position=row.num_tokens,
        )
    except ShardFault as error:
        return error


def _takes_likeliest(row: SampledRow) -> bool:
    """Whether its token is the likeliest one as it came."""
    params = row.params
    return row.counts is None and params.logprobs is None and (params.temperature == 0.0 or params.top_k == 1)


def _draws_plainly(row: SampledRow, top_k: int) -> bool:
    """Whether its token is drawn from the candidates as they came."""
    params = row.params
    is_plain = row.counts is None and params.logprobs is None
    return is_plain and params.temperature != 0.0 and params.top_k == top_k


def choose_tokens(outputs: CandidateRows | WholeRows, rows: Many[SampledRow]) -> list[Choice]:
    """The next token for each row of one output group; rows[i] is row i's sequence."""
    if isinstance(outputs, CandidateRows):
        num_candidates = outputs.token_ids.shape[1]
        if all(_takes_likeliest(row) for row in rows):
            return _take_likeliest(outputs, rows)
        # Rows that asked for the same number of candidates, and for the same besides, are cut alike.
        top_k = 0 if outputs.scaled_log_sum_exp is not None else num_candidates
        drawn = [index for index, row in enumerate(rows) if _draws_plainly(row, top_k)]
        if len(drawn) >= MIN_ROWS_TO_DRAW:
            return _draw_some(outputs, rows, drawn)
    return [choose_token(outputs, index, row) for index, row in enumerate(rows)]


def _take_likeliest(outputs: CandidateRows, rows: Many[SampledRow]) -> list[Choice]:
    """Greedy rows and those of top-k 1, where the random number cannot matter."""
    if not np.isfinite(outputs.logits[:, 0]).all():
        return [choose_token(outputs, index, row) for index, row in enumerate(rows)]
    return [Sampled(token_id, None, ()) for token_id in outputs.token_ids[:, 0].tolist()]


def _draw_some(outputs: CandidateRows, rows: Many[SampledRow], drawn: list[int]) -> list[Choice]:
    """Draws for the rows of `drawn` together, and for the others one by one."""
    whole = len(drawn) == len(rows)
    places = _draw_places(
        outputs if whole else outputs.take(drawn), rows if whole else [rows[index] for index in drawn]
    )
    choices: list[Choice] = []
    next_drawn = 0
    for index, row in enumerate(rows):
        place = -1
        if next_drawn < len(drawn) and drawn[next_drawn] == index:
            place = places[next_drawn]
            next_drawn += 1
        if place < 0:
            choices.append(choose_token(outputs, index, row))
        else:
            choices.append(Sampled(int(outputs.token_ids[index, place]), None, ()))
    return choices


def _draw_places(outputs: CandidateRows, rows: Many[SampledRow]) -> list[int]:
    """Which candidate each row draws; -1 for one that `sample` has to decide, because these do not or are at fault."""
    params = [row.params for row in rows]
    temperatures = np.array([max(one.temperature, MIN_TEMPERATURE) for one in params])
    with np.errstate(invalid="ignore", over="ignore"):  # rows at fault
        weights = outputs.logits.astype(np.float64)
        weights -= weights[:, :1].copy()
        weights /= temperatures[:, None]
        np.exp(weights, out=weights)
        cumulative = weights.cumsum(axis=1)
    good = np.isfinite(outputs.logits[:, 0]) & (cumulative[:, -1] >= 1.0)
    least, most = _mass_intervals(outputs, temperatures, weights, cumulative, good)
    top_p = np.array([one.top_p for one in params])
    min_p = np.array([one.min_p for one in params])
    least, most = _cut(weights, cumulative, least, most, top_p, min_p)
    numbers = np.array([uniform(row.seed, row.index, row.num_tokens) for row in rows])
    places = (cumulative <= (numbers * least)[:, None]).sum(axis=1)
    good &= places == (cumulative <= (numbers * most)[:, None]).sum(axis=1)
    good &= places < weights.shape[1]
    drawn: list[int] = np.where(good, places, -1).tolist()
    return drawn


def _mass_intervals(
    outputs: CandidateRows,
    temperatures: _Float64s,
    weights: _Float64s,
    cumulative: _Float64s,
    good: npt.NDArray[np.bool_],
) -> tuple[_Float64s, _Float64s]:
    """Bounds of each row's mass; [n] each. A row whose log-sum-exp cannot be is marked as not good."""
    least = cumulative[:, -1].copy()
    most = least.copy()
    if outputs.scaled_log_sum_exp is None:
        return least, most
    columns = (outputs.logits[:, 0], outputs.scaled_log_sum_exp, temperatures, cumulative[:, -1], weights[:, -1])
    for index, (peak, log_sum_exp, temperature, known, last) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        if not good[index]:
            continue
        try:
            least[index], most[index] = mass_interval(peak, log_sum_exp, temperature, known, last)
        except ShardFault:
            good[index] = False
    return least, most


def _cut(
    weights: _Float64s, cumulative: _Float64s, least: _Float64s, most: _Float64s, top_p: _Float64s, min_p: _Float64s
) -> tuple[_Float64s, _Float64s]:
    """Bounds of each row's mass after top-p and min-p, as sampler.py's `_draw` has them; [n] each, weights [n, k]."""
    lines, k = np.arange(len(weights)), weights.shape[1]
    if (top_p < 1.0).any():
        first_cut = (cumulative < (top_p * least)[:, None]).sum(axis=1)
        last_cut = (cumulative < (top_p * most)[:, None]).sum(axis=1)
        cut_least = np.where(
            first_cut < k, cumulative[lines, np.minimum(first_cut, k - 1)], np.maximum(cumulative[:, -1], top_p * least)
        )
        cut_most = np.where(
            last_cut < k,
            cumulative[lines, np.minimum(last_cut, k - 1)],
            np.minimum(most, top_p * most + weights[:, -1]),
        )
        least, most = np.where(top_p < 1.0, cut_least, least), np.where(top_p < 1.0, cut_most, most)
    if (min_p > 0.0).any():
        num_kept = (weights >= min_p[:, None]).sum(axis=1)
        kept = cumulative[lines, num_kept - 1]
        least = np.where(min_p > 0.0, np.minimum(least, kept), least)
        most = np.where((min_p > 0.0) & (num_kept < k), np.minimum(most, kept), most)
    return least, most
