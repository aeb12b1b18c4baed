"""Choosing one token: greedy, ties, seeds, log-probabilities, and rows that are not what they should be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import log_softmax
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from stagecoach.errors import ShardFault
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.outputs import CandidateRows, Sampled, WholeRows
from tests.unit.router.sampling_reference import (
    candidates,
    counts_for,
    distribution,
    one_row,
    sample,
    sample_whole,
    whole,
)

GREEDY = SamplingParams(temperature=0.0)
VOCAB_SIZE = 5_000


def row(seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 4, VOCAB_SIZE).astype(np.float32)


def choose(output: CandidateRows | WholeRows, params: SamplingParams, **counters: int) -> Sampled:
    sampled = sample(
        output,
        params,
        counts_for(params),
        **{"seed": 0, "completion": 0, "position": 0, **counters},
    )
    assert isinstance(sampled, Sampled)
    return sampled


def test_temperature_0_takes_the_largest_whatever_the_seed() -> None:
    logits = row()
    for seed in range(20):
        assert choose(whole(logits), GREEDY, seed=seed).token_id == logits.argmax()
        assert choose(candidates(logits, 1, 0.0), GREEDY, seed=seed).token_id == logits.argmax()


def test_temperature_0_takes_the_lowest_of_equals() -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[[7, 30, 90]] = 2.0
    assert choose(whole(logits), GREEDY).token_id == 7
    assert choose(candidates(logits, 2, 0.0), GREEDY).token_id == 7


def test_top_k_keeps_exactly_k_and_of_equals_the_lowest() -> None:
    logits = np.zeros(100, dtype=np.float32)
    logits[50] = 1.0
    params = SamplingParams(top_k=3)
    for output in (whole(logits), candidates(logits, 3, 1.0)):
        drawn = {choose(output, params, position=position).token_id for position in range(200)}
        assert drawn == {0, 1, 50}


def test_the_two_zeros_are_equal() -> None:
    logits = np.array([-1.0, -0.0, 0.0], dtype=np.float32)
    for output in (whole(logits), candidates(logits, 1, 1.0)):
        assert choose(output, SamplingParams(top_k=1)).token_id == 1
        assert choose(output, GREEDY).token_id == 1


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], dtype=np.float32))
    drawn = {choose(whole(logits), SamplingParams(top_p=0.5), position=position).token_id for position in range(200)}
    assert drawn == {0, 1}


def test_top_p_that_is_reached_exactly_keeps_no_more() -> None:
    logits = np.zeros(4, dtype=np.float32)
    drawn = {choose(whole(logits), SamplingParams(top_p=0.5), position=position).token_id for position in range(200)}
    assert drawn == {0, 1}


def test_the_same_counters_draw_the_same_token_and_others_another() -> None:
    output, params = whole(row()), SamplingParams(temperature=2.0)

    def drawn(**fixed: int) -> list[int]:
        return [choose(output, params, **{"position": position, **fixed}).token_id for position in range(30)]

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert drawn(completion=0) != drawn(completion=1)
    assert len(set(drawn())) > 10


@pytest.mark.parametrize(
    "shaping",
    [
        {},
        {"temperature": 0.0, "repetition_penalty": 1.01},
        {"temperature": 0.0},
        {"top_k": 3, "repetition_penalty": 1.5, "temperature": 0.3},
    ],
    ids=repr,
)
@pytest.mark.parametrize("num_top", [0, 1, 5, 100])
def test_logprobs_are_those_of_the_models_own_distribution(num_top: int, shaping: dict[str, Any]) -> None:
    logits = row()
    expected = log_softmax(logits.astype(np.float64))
    order = np.argsort(-logits, kind="stable")
    params = SamplingParams(logprobs=num_top, **shaping)
    counts = counts_for(params, order[:3].tolist(), ())
    for output in (whole(logits), candidates(logits, 2_000, params.temperature)):
        sampled = sample(output, params, counts, seed=3, completion=0, position=0)
        assert isinstance(sampled, Sampled)
        assert sampled.logprob == pytest.approx(expected[sampled.token_id], abs=2e-6)
        assert [token_id for token_id, _ in sampled.top] == order[:num_top].tolist()
        assert [value for _, value in sampled.top] == pytest.approx(expected[order[:num_top]].tolist(), abs=2e-6)


def test_no_logprobs_unless_asked_for() -> None:
    assert choose(whole(row()), SamplingParams()) == Sampled(choose(whole(row()), SamplingParams()).token_id, None, ())


def test_masked_tokens_are_never_drawn_nor_listed() -> None:
    logits = np.full(VOCAB_SIZE, -np.inf, dtype=np.float32)
    logits[[4, 40, 400]] = [1.0, 3.0, 2.0]
    for params in (SamplingParams(temperature=100.0, logprobs=10), SamplingParams(top_k=50, logprobs=10)):
        for output in (whole(logits), candidates(logits, 50, params.temperature)):
            results = [choose(output, params, position=position) for position in range(100)]
            assert {result.token_id for result in results} == {4, 40, 400}
            assert [token_id for token_id, _ in results[0].top] == [40, 400, 4]


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(top_k=5), SamplingParams(logit_bias={1: -1.0})], ids=repr
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_a_logit_that_is_no_number_is_a_fault_of_the_shard(bad: float, params: SamplingParams) -> None:
    logits = row()
    logits[4_321] = bad
    with pytest.raises(ShardFault) as caught:
        choose(whole(logits), params)
    assert caught.value.field == "logits"
    assert caught.value.retryable
    first = one_row(np.array([4_321], dtype=np.int32), logits[[4_321]], None, None)
    with pytest.raises(ShardFault):
        choose(first, params)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=5)], ids=repr)
def test_a_row_that_is_masked_all_over_is_a_fault_of_the_shard(params: SamplingParams) -> None:
    logits = np.full(100, -np.inf, dtype=np.float32)
    with pytest.raises(ShardFault):
        choose(whole(logits), params)
    with pytest.raises(ShardFault):
        choose(one_row(np.arange(5, dtype=np.int32), logits[:5], -math.inf, -math.inf), params)


def test_a_nan_among_the_candidates_is_a_fault_of_the_shard() -> None:
    broken = one_row(np.arange(3, dtype=np.int32), np.array([2.0, math.nan, 1.0], dtype=np.float32), 3.0, 3.0)
    for params in (SamplingParams(), SamplingParams(top_k=3)):
        with pytest.raises(ShardFault):
            choose(broken, params)


@pytest.mark.parametrize("log_sum_exp", [math.nan, -math.inf, 0.5])
def test_a_log_sum_exp_that_contradicts_the_candidates_is_a_fault_of_the_shard(log_sum_exp: float) -> None:
    broken = one_row(
        np.arange(3, dtype=np.int32), np.array([2.0, 1.5, 1.0], dtype=np.float32), log_sum_exp, log_sum_exp
    )
    with pytest.raises(ShardFault):
        choose(broken, SamplingParams())


def test_a_log_sum_exp_that_is_no_number_gives_no_logprobs() -> None:
    broken = one_row(np.arange(1, dtype=np.int32), np.array([2.0], dtype=np.float32), math.nan, math.nan)
    with pytest.raises(ShardFault) as caught:
        choose(broken, SamplingParams(temperature=0.0, logprobs=0))
    assert caught.value.field == "log_sum_exp"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("fields", "warpers"),
    [
        ({"top_k": 30}, [TopKLogitsWarper(30)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"top_k": 30, "top_p": 0.7}, [TopKLogitsWarper(30), TopPLogitsWarper(0.7)]),
        ({"top_p": 0.9, "min_p": 0.05}, [TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]),
    ],
    ids=["top_k", "top_p", "min_p", "top_k and top_p", "top_p and min_p"],
)
def test_the_cuts_are_those_of_transformers(fields: dict[str, Any], warpers: list[Any], temperature: float) -> None:
    """Our definition keeps what theirs keep, and we draw all of that and nothing else. (No equal logits: theirs keeps
    all that equal the k-th.)"""
    logits = row(1)[:200]
    scores = torch.from_numpy(logits)[None]
    for warp in [TemperatureLogitsWarper(temperature), *warpers]:
        scores = warp(None, scores)
    theirs = scores.softmax(-1)[0].numpy()
    params = SamplingParams(temperature=temperature, **fields)
    np.testing.assert_allclose(distribution(logits, params), theirs, atol=1e-6)
    drawn = {sample_whole(logits, params, position=position).token_id for position in range(2_000)}
    assert drawn <= set(np.flatnonzero(theirs).tolist())
    assert drawn >= set(np.flatnonzero(theirs > 0.01).tolist())
