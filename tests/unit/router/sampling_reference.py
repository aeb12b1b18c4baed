"""Sampling by its definitions, slowly, in plain Python and float64: what the sampler's tests compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from stagecoach.errors import ShardFault
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.outputs import CandidateRows, InsufficientCandidates, Sampled, WholeRows
from stagecoach_router.sampling.penalties import TokenCounts
from stagecoach_router.sampling.sampler import choose_tokens


def distribution(
    logits: npt.NDArray[np.float32], params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> npt.NDArray[np.float64]:
    """The probability of each token, [vocab]."""
    shaped = {}
    for token_id, logit in enumerate(logits.tolist()):
        x = logit + params.logit_bias.get(token_id, 0.0)
        if token_id in prompt or token_id in output:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * list(output).count(token_id)
        x -= params.presence_penalty if token_id in output else 0.0
        shaped[token_id] = x
    falling = sorted(shaped, key=lambda token_id: (-shaped[token_id], token_id))
    probabilities = np.zeros(len(logits))
    if params.temperature == 0.0:
        probabilities[falling[0]] = 1.0
        return probabilities
    peak = shaped[falling[0]]
    kept = falling[: params.top_k] if params.top_k else falling
    weight = {token_id: math.exp((shaped[token_id] - peak) / params.temperature) for token_id in kept}
    if params.top_p < 1.0:
        mass, reached, crossing = sum(weight.values()), 0.0, []
        for token_id in kept:
            crossing.append(token_id)
            reached += weight[token_id]
            if reached >= params.top_p * mass:
                break
        kept = crossing
    kept = [token_id for token_id in kept if weight[token_id] >= params.min_p * weight[falling[0]]]
    mass = sum(weight[token_id] for token_id in kept)
    for token_id in kept:
        probabilities[token_id] = weight[token_id] / mass
    return probabilities


def candidates(logits: npt.NDArray[np.float32], num_candidates: int, temperature: float) -> CandidateRows:
    """What a shard makes of a row: the log-sum-exps are rounded to float32."""
    ids = np.argsort(-logits, kind="stable")[:num_candidates]
    row = logits.astype(np.float64)
    return one_row(ids.astype(np.int32), logits[ids], logsumexp(row), logsumexp(row / (np.float32(temperature) or 1.0)))


def one_row(
    token_ids: npt.NDArray[np.int32],
    logits: npt.NDArray[np.float32],
    log_sum_exp: float | None,
    scaled_log_sum_exp: float | None,
) -> CandidateRows:
    """Candidates, [k] each, of a single row."""
    plain, scaled = (
        None if value is None else np.array([value], dtype=np.float32) for value in (log_sum_exp, scaled_log_sum_exp)
    )
    return CandidateRows(token_ids[None], logits[None], plain, scaled)


def whole(logits: npt.NDArray[np.float32]) -> WholeRows:
    return WholeRows(logits[None])


@dataclass
class Row:
    """What the sampler looks at of a sequence."""

    params: SamplingParams
    counts: TokenCounts | None = None
    seed: int = 0
    index: int = 0
    num_tokens: int = 0


def sample(
    output: CandidateRows | WholeRows,
    params: SamplingParams,
    counts: TokenCounts | None = None,
    *,
    seed: int = 0,
    completion: int = 0,
    position: int = 0,
) -> Sampled | InsufficientCandidates:
    """What the sampler chooses for a row by itself. Raises the row's error."""
    [choice] = choose_tokens(output, [Row(params, counts, seed, completion, position)])
    if isinstance(choice, ShardFault):
        raise choice
    return choice


def counts_of(prompt: Sequence[int], output: Sequence[int]) -> TokenCounts:
    return TokenCounts(prompt, output)


def counts_for(params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> TokenCounts | None:
    """As a sequence has them: none where nothing looks at them."""
    return counts_of(prompt, output) if params.shapes_logits else None


def sample_whole(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    counts: TokenCounts | None = None,
    *,
    seed: int = 0,
    position: int = 0,
) -> Sampled:
    sampled = sample(whole(logits), params, counts or counts_for(params), seed=seed, position=position)
    assert not isinstance(sampled, InsufficientCandidates)
    return sampled
