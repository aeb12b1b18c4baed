"""Chooses tokens. Pure: logits and parameters in, tokens out.

In order: logit bias, penalties (see penalties.py), temperature, top-k, top-p, min-p, and a draw from what is left.
    temperature  logits are divided by it; 0 takes the largest logit, the lowest id of equals, and draws nothing
    top-k        the k largest logits, of equals the lowest ids: exactly k
    top-p        of those, the smallest set of likeliest tokens whose probability, among those, reaches p: the token
                 that crosses p is kept (Holtzman et al. 2020)
    min-p        of those, the ones at least min_p times as likely as the likeliest (Nguyen et al. 2024)
    draw         the inverse of the cumulative distribution, likeliest token first, equals by rising id, at one
                 uniform number (see randomness.py)

Candidates are as good as the whole row as long as the draw falls within them: the mass of the rest is enough, and the
log-sum-exp tells it. It comes as a float32, so the mass is known to lie in an interval; the candidates decide only
where all of the interval gives the same token. Else more is asked for (`wider_output`): more candidates or, where these
do not do either, the whole row. The same number therefore gives the same token either way. All rows of a step are
worked on together; a row's token is the same whatever is beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stagecoach.errors import ShardFault
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.draw import (
    MAX_EXPONENT,
    MIN_SCALED_TEMPERATURE,
    MIN_TEMPERATURE,
    Float32s,
    Float64s,
    draw,
    mass_bounds,
    weights_of,
)
from stagecoach_router.sampling.outputs import CandidateRows, InsufficientCandidates, Sampled, WholeRows
from stagecoach_router.sampling.penalties import TokenCounts, num_lowered, only_lowers, shape_candidates, shape_row
from stagecoach_router.sampling.randomness import uniform

# What becomes of a row: a token, a reason to ask for more of it, or what is wrong with it.
Choice = Sampled | InsufficientCandidates | ShardFault

_INSUFFICIENT = InsufficientCandidates()
# Of a sum of weights in float64, relative, whatever its order; far more than it is.
_SUM_ERROR = 1e-9
# How much of a whole row is ordered at first, and then; a draw beyond that is rare, and only then is all of it.
_PREFIXES = (256, 4096)
# Folding a row to a 64th keeps enough maxima for a close bound of the 256th largest, from a vocabulary of 32k on.
_NUM_FOLDS = 64


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


def choose_tokens(outputs: CandidateRows | WholeRows, rows: Sequence[SampledRow]) -> list[Choice]:
    """The next token for each row of one output group, exactly as its parameters say; rows[i] is row i's sequence.

    Seed, completion and position choose the random number. A whole row always gives a token, unless its logits are not
    numbers; a row at fault is answered with its error, and changes nothing for the others.
    """
    if isinstance(outputs, WholeRows):
        return [_choose_from_whole_row(logits, row) for logits, row in zip(outputs.logits, rows, strict=True)]
    token_ids = outputs.token_ids
    likeliest = token_ids[:, 0].tolist()
    choices: list[Choice] = []
    for index, (row, place) in enumerate(zip(rows, _choose_places(outputs, rows), strict=True)):
        if not isinstance(place, int):
            choices.append(place)
        elif row.params.logprobs is None:
            choices.append(Sampled(token_ids.item(index, place) if place else likeliest[index], None, ()))
        else:
            choices.append(_with_logprobs_of(outputs, index, place, row.params.logprobs))
    return choices


def _choose_places(
    outputs: CandidateRows, rows: Sequence[SampledRow]
) -> list[int | InsufficientCandidates | ShardFault]:
    """Which of its candidates each row gets."""
    peaks = outputs.logits[:, 0].tolist()
    places: list[int | InsufficientCandidates | ShardFault] = [0] * len(rows)
    drawn: list[int] = []
    shaped: dict[int, _Shaped] = {}
    for index, (row, peak) in enumerate(zip(rows, peaks, strict=True)):
        if not -math.inf < peak < math.inf:
            places[index] = _peak_fault(peak)
            continue
        if row.counts is not None:
            shaped[index] = _Shaped(outputs, index, row.params, row.counts)
        if row.params.temperature != 0.0 and row.params.top_k != 1:
            drawn.append(index)
    if drawn:
        for index, place in zip(drawn, _draw_places(outputs, rows, drawn, shaped), strict=True):
            places[index] = place
    for index, row_shaped in shaped.items():
        place = places[index]
        if row_shaped.num_certain == 0:
            places[index] = _INSUFFICIENT
        elif isinstance(place, int):
            places[index] = int(row_shaped.order[place])
    return places


class _Shaped:
    """A row's candidates after bias and penalties, in their new order; [k] each.

    Where shaping only lowers, what is not among the candidates is still at most as large as the last of them was, and
    the `num_certain` that stay above that are the row's largest. Where it may raise, nothing is known.
    """

    __slots__ = ("counts", "logits", "num_certain", "order")

    def __init__(self, outputs: CandidateRows, index: int, params: SamplingParams, counts: TokenCounts) -> None:
        token_ids, logits = outputs.token_ids[index], outputs.logits[index]
        shaped = shape_candidates(token_ids, logits, params, counts)
        self.counts = counts
        self.order = np.lexsort((token_ids, -shaped))  # places among the candidates as they came
        self.logits = shaped[self.order]
        self.num_certain = int(np.count_nonzero(self.logits > logits[-1])) if only_lowers(params) else 0

    def mass_bounds(
        self, raw: Float32s, scaled_log_sum_exp: float | None, params: SamplingParams, known: float
    ) -> tuple[float, float] | None:
        """Bounds of the shaped row's mass, relative to its largest logit; None where nothing can be said of it.

        raw: the candidates' logits as they came, [k]. known: mass of the shaped ones. What is outside of them weighs
        what it did before shaping, but for tokens that it lowered, to anything between that and nothing.
        """
        temperature = max(params.temperature, MIN_TEMPERATURE)
        sunk = (float(raw[0]) - float(self.logits[0])) / temperature
        if temperature < MIN_SCALED_TEMPERATURE or not sunk <= MAX_EXPONENT:
            return None
        before = weights_of(raw[None], [temperature])
        known_before, last = float(before.sum()), float(before[0, -1])
        bounds = mass_bounds(float(raw[0]), scaled_log_sum_exp, temperature, known_before, last)
        if bounds is None:
            return None
        scale = math.exp(sunk)  # both now relative to the largest shaped logit
        least = known + scale * max(0.0, bounds[0] - known_before - last * num_lowered(params, self.counts))
        most = known + scale * (bounds[1] - known_before)
        return least * (1 - _SUM_ERROR), most * (1 + _SUM_ERROR)


def _draw_places(
    outputs: CandidateRows, rows: Sequence[SampledRow], drawn: list[int], shaped: dict[int, _Shaped]
) -> list[int | InsufficientCandidates | ShardFault]:
    """Where among its candidates, in their order after shaping, the number of each row of `drawn` falls."""
    if len(drawn) < len(rows):
        outputs, rows = outputs.take(drawn), [rows[index] for index in drawn]
    params = [row.params for row in rows]
    logits = outputs.logits
    if shaped:
        logits = logits.copy()
        for place, index in enumerate(drawn):
            if index in shaped:
                logits[place] = shaped[index].logits
    weights = weights_of(logits, [max(one.temperature, MIN_TEMPERATURE) for one in params])
    cumulative = np.add.accumulate(weights, axis=1)
    num_known, least, most, failed = _bounds(outputs, weights, cumulative, params, [shaped.get(i) for i in drawn])
    numbers = [uniform(row.seed, row.index, row.num_tokens) for row in rows]
    places = draw(weights, cumulative, num_known, least, most, params, numbers)
    return [failed.get(index, _INSUFFICIENT if place is None else place) for index, place in enumerate(places)]


def _bounds(
    outputs: CandidateRows,
    weights: Float64s,
    cumulative: Float64s,
    params: Sequence[SamplingParams],
    shaped: Sequence[_Shaped | None],
) -> tuple[list[int], list[float], list[float], dict[int, InsufficientCandidates | ShardFault]]:
    """What is known of each row: how many weights are those of its likeliest tokens, and the mass of all that count.

    Returns those numbers, the least and the most mass (of the top k, or of all tokens), and the rows, by index, from
    which no token can be drawn.
    """
    num_candidates = cumulative.shape[1]
    known: list[float] = cumulative[:, -1].tolist()
    last: list[float] = weights[:, -1].tolist()
    peaks: list[float] = outputs.logits[:, 0].tolist()
    log_sum_exps = [None] * len(params) if outputs.scaled_log_sum_exp is None else outputs.scaled_log_sum_exp.tolist()
    num_known = [num_candidates] * len(params)
    least, most = list(known), list(known)
    failed: dict[int, InsufficientCandidates | ShardFault] = {}
    for index, one in enumerate(params):
        row_shaped = shaped[index]
        if row_shaped is not None:
            num_known[index] = max(row_shaped.num_certain, 1)
        if num_known[index] < one.top_k:
            failed[index] = _INSUFFICIENT
            continue
        if 0 < one.top_k < num_candidates:
            num_known[index] = one.top_k
            least[index] = most[index] = cumulative.item(index, one.top_k - 1)
        if not least[index] >= 1.0:
            failed[index] = ShardFault("candidates: a logit is not a number", field="logits", value=least[index])
        elif not one.top_k:
            try:
                if row_shaped is None:
                    temperature = max(one.temperature, MIN_TEMPERATURE)
                    bounds = mass_bounds(peaks[index], log_sum_exps[index], temperature, known[index], last[index])
                else:
                    bounds = row_shaped.mass_bounds(outputs.logits[index], log_sum_exps[index], one, known[index])
            except ShardFault as error:
                failed[index] = error
                continue
            if bounds is None:
                failed[index] = _INSUFFICIENT
            else:
                least[index], most[index] = bounds
    return num_known, least, most, failed


def _choose_from_whole_row(raw: Float32s, row: SampledRow) -> Choice:
    """The next token from all logits of a row; raw: [vocab_size]."""
    params = row.params
    logits = raw if row.counts is None else shape_row(raw, params, row.counts)
    token_id = int(logits.argmax())  # the first NaN, if there is one
    peak = float(logits[token_id])
    if not -math.inf < peak < math.inf:
        return _peak_fault(peak)
    if params.temperature != 0.0:
        token_id = _draw_from_whole_row(logits, params, uniform(row.seed, row.index, row.num_tokens))
    if params.logprobs is None:
        return Sampled(token_id, None, ())
    raw_peak = float(raw.max())
    log_sum_exp = raw_peak + math.log(_mass(raw, raw_peak, 1.0))
    top_ids = _largest(raw, max(params.logprobs, 1))
    return _with_logprobs(token_id, float(raw[token_id]), log_sum_exp, top_ids, raw[top_ids], params.logprobs)


def _draw_from_whole_row(logits: Float32s, params: SamplingParams, number: float) -> int:
    """The drawn token's id. logits: [vocab_size], which are ordered as far down as the draw falls."""
    temperature = max(params.temperature, MIN_TEMPERATURE)
    mass = None if params.top_k else _mass(logits, float(logits.max()), temperature)
    for num in (params.top_k,) if params.top_k else (*_PREFIXES, len(logits)):
        ids = _largest(logits, num)
        weights = weights_of(logits[ids][None], [temperature])
        cumulative = np.add.accumulate(weights, axis=1)
        if mass is None or num == len(logits):
            mass = cumulative.item(0, -1)
        [place] = draw(weights, cumulative, [len(ids)], [mass], [mass], [params], [number])
        if place is not None:
            return int(ids[place])
    raise AssertionError("number < 1, so it falls short of the last token's end")


def _mass(logits: Float32s, peak: float, temperature: float) -> float:
    """sum(exp((logit - peak) / temperature)) over a whole row."""
    weights = logits.astype(np.float64)
    weights -= peak
    weights /= temperature
    return float(np.exp(weights, out=weights).sum())


def _largest(logits: Float32s, num: int) -> npt.NDArray[np.int64]:
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


def _with_logprobs_of(outputs: CandidateRows, index: int, place: int, num_top: int) -> Choice:
    """The token at a place among a row's candidates, with log-probabilities."""
    assert outputs.log_sum_exp is not None, "log-probabilities were not asked for with the candidates"
    token_ids, logits = outputs.token_ids[index], outputs.logits[index]
    log_sum_exp = float(outputs.log_sum_exp[index])
    return _with_logprobs(int(token_ids[place]), float(logits[place]), log_sum_exp, token_ids, logits, num_top)


def _with_logprobs(
    token_id: int,
    logit: float,
    log_sum_exp: float,
    top_ids: npt.NDArray[np.integer],
    top_logits: Float32s,
    num_top: int,
) -> Choice:
    if not math.isfinite(log_sum_exp):
        return ShardFault("the log-sum-exp of a row is not a number", field="log_sum_exp", value=log_sum_exp)
    top = zip(top_ids[:num_top].tolist(), top_logits[:num_top].tolist(), strict=True)
    return Sampled(
        token_id,
        logit - log_sum_exp,
        tuple((top_id, value - log_sum_exp) for top_id, value in top if value > -math.inf),
    )


def _peak_fault(peak: float) -> ShardFault:
    """For a row whose largest logit, which is NaN if any is, is not a finite number."""
    return ShardFault(f"a row of logits has {peak} for its largest", field="logits", value=peak)
