"""What the router asks the last stage for each position it samples from, what comes back, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.penalties import only_lowers

# More candidates than this are asked for as a whole row: past it, what candidates save is no longer much. The contract
# allows more (`stagecoach.rpc.shard_rpc.MAX_CANDIDATES`).
WHOLE_ROW_ABOVE = 1024

# Candidates where the parameters set no number of them (temperature, top-p, min-p). Each costs eight bytes at every
# token; falling short costs one more trip of one token through all stages, and a whole row. So many draws fell short on
# SmolLM2-135M's own chat text, at temperature 1 (and with top-p 0.9):
#   64: 9.0 % (4.5 %)   128: 6.1 % (2.2 %)   256: 3.9 % (0.9 %)   1024: 1.4 % (0.04 %)
# At temperature 0.7 and top-p 0.9, 128 fail once in ten thousand. Larger models are surer of themselves. On a CPU,
# reducing to 256 takes the last stage longer than the trips it saves.
OPEN_CANDIDATES = 128

# Where they fell short, so many are asked for (8 KB), and only if those fall short too the whole row (197 KB for 49,152
# float32 logits). Four times as many are hardly ever better: that far down a token weighs as little as the log-sum-exp,
# a float32, leaves open.
MORE_CANDIDATES = 1024

# Candidates beyond those needed where penalties may push some of them out.
PENALTY_MARGIN = 64


@dataclass(frozen=True, slots=True)
class OutputWant:
    """What is asked for one position. Positions with equal (num_candidates, log_sum_exp) share an output group."""

    num_candidates: int  # 0: the whole row
    log_sum_exp: bool  # with candidates only
    temperature: float  # for the log-sum-exp


WHOLE_ROW = OutputWant(num_candidates=0, log_sum_exp=False, temperature=1.0)


@dataclass(frozen=True, slots=True)
class CandidateRows:
    """The candidates of one step's rows that asked for as many: each row's largest logits.

    They fall along a row, equal ones by rising id. The log-sum-exps are of whole rows, plain and divided by the row's
    temperature.
    """

    token_ids: npt.NDArray[np.int32]  # [n, k]
    logits: npt.NDArray[np.float32]  # [n, k]
    log_sum_exp: npt.NDArray[np.float32] | None  # [n]
    scaled_log_sum_exp: npt.NDArray[np.float32] | None  # [n]

    def take(self, indices: Sequence[int]) -> CandidateRows:
        """The candidates of these rows only."""
        return CandidateRows(
            self.token_ids[indices],
            self.logits[indices],
            None if self.log_sum_exp is None else self.log_sum_exp[indices],
            None if self.scaled_log_sum_exp is None else self.scaled_log_sum_exp[indices],
        )


@dataclass(frozen=True, slots=True)
class WholeRows:
    """All logits of one step's rows that asked for them."""

    logits: npt.NDArray[np.float32]  # [n, vocab_size]

    def take(self, indices: Sequence[int]) -> WholeRows:
        """The logits of these rows only."""
        return WholeRows(self.logits[indices])


class Sampled(NamedTuple):
    """A chosen token. Log-probabilities are of the model's own distribution: before bias, penalties and temperature."""

    token_id: int
    logprob: float | None  # where the parameters ask for it
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and theirs, likeliest first, as many as asked for


@dataclass(frozen=True, slots=True)
class InsufficientCandidates:
    """The candidates do not determine the token; what `wider_output` asks for instead may, and the whole row does."""


def wanted_output(params: SamplingParams, vocab_size: int) -> OutputWant:
    """The least that usually determines the next token. Where it does not, sampling says so, and more is asked for."""
    greedy_or_top_k = 1 if params.greedy else params.top_k
    if params.shapes_logits:
        # Lowered logits: any number of candidates may sink, but nothing outside of them can rise.
        if not only_lowers(params):
            return WHOLE_ROW
        num_candidates = (greedy_or_top_k or OPEN_CANDIDATES) + PENALTY_MARGIN
    else:
        num_candidates = greedy_or_top_k or OPEN_CANDIDATES
    with_logprobs = params.logprobs is not None
    num_candidates = max(num_candidates, params.logprobs or 0)
    # A candidate takes eight bytes and a logit of a whole row two or four.
    if num_candidates > WHOLE_ROW_ABOVE or 2 * num_candidates >= vocab_size:
        return WHOLE_ROW
    return OutputWant(num_candidates, with_logprobs or not greedy_or_top_k, params.temperature)


def wider_output(want: OutputWant, vocab_size: int) -> OutputWant:
    """What to ask for at a position whose token `want` did not determine: it ends at the whole row, which does."""
    is_open = want.num_candidates in (OPEN_CANDIDATES, OPEN_CANDIDATES + PENALTY_MARGIN) and want.log_sum_exp
    if is_open and vocab_size > 2 * MORE_CANDIDATES:
        return OutputWant(MORE_CANDIDATES, True, want.temperature)
    return WHOLE_ROW
