"""Candidates and whole rows give the same token to the same number, where candidates give one; and they mostly do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stagecoach.rpc.shard_rpc import MAX_CANDIDATES
from stagecoach.sampling_params import SAMPLING_FIELDS, SamplingParams
from stagecoach_router.sampling.outputs import (
    MORE_CANDIDATES,
    WHOLE_ROW,
    WHOLE_ROW_ABOVE,
    CandidateRows,
    InsufficientCandidates,
    Sampled,
    wanted_output,
)
from stagecoach_router.sampling.penalties import TokenCounts
from stagecoach_router.sampling.randomness import uniform
from stagecoach_shard.runtime.logit_reduction import log_sum_exp, top_candidates
from tests.unit.router.sampling_reference import candidates, counts_for, distribution, sample, sample_whole

VOCAB_SIZE = 49_152


def reduced_by_a_shard(logits: npt.NDArray[np.float32], num_candidates: int, temperature: float) -> CandidateRows:
    row = torch.from_numpy(logits)[None]
    ids, values = top_candidates(row, num_candidates)
    plain, scaled = log_sum_exp(row, torch.tensor([temperature], dtype=torch.float32))
    return CandidateRows(ids.numpy(), values.numpy(), plain.numpy(), scaled.numpy())


def from_candidates(
    output: CandidateRows,
    params: SamplingParams,
    counts: TokenCounts | None = None,
    *,
    seed: int = 0,
    position: int = 0,
) -> Sampled | InsufficientCandidates:
    return sample(
        output,
        params,
        counts or counts_for(params),
        seed=seed,
        completion=0,
        position=position,
    )


def described(value: object) -> str:
    if not isinstance(value, SamplingParams):
        return str(value)
    defaults = SamplingParams()
    chosen = {name: getattr(value, name) for name in SAMPLING_FIELDS if getattr(value, name) != getattr(defaults, name)}
    return " ".join(f"{name}={setting}" for name, setting in chosen.items()) or "defaults"


@st.composite
def params_of_any_kind(draw: st.DrawFn) -> SamplingParams:
    off = st.just
    bias = st.dictionaries(st.integers(0, 99), st.floats(-5.0, 0.0) | st.floats(-5.0, 5.0), max_size=4)
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.01, 0.7, 1.0, 5.0]) | st.floats(0.0, 100.0)),
        top_k=draw(off(0) | st.integers(0, 40)),
        top_p=draw(off(1.0) | st.floats(0.0, 1.0, exclude_min=True) | st.sampled_from([0.25, 0.5, 0.75])),
        min_p=draw(off(0.0) | st.floats(0.0, 1.0) | st.sampled_from([0.25, 0.5, 1.0])),
        repetition_penalty=draw(off(1.0) | st.floats(0.5, 2.0)),
        presence_penalty=draw(off(0.0) | st.floats(-2.0, 2.0)),
        frequency_penalty=draw(off(0.0) | st.floats(-1.0, 1.0)),
        logit_bias=draw(off({}) | bias),
    )


@st.composite
def rows(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """100 to 400 logits of any spread, coarse (full of equal ones) or fine, perhaps with masked ones."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread, offset = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0])), draw(st.sampled_from([0.0, -30.0, 300.0]))
    logits = generator.normal(offset, spread, draw(st.integers(100, 400))).astype(np.float32)
    if draw(st.booleans()):
        logits = torch.from_numpy(logits).bfloat16().float().numpy()
    if draw(st.booleans()):
        logits[generator.random(len(logits)) < draw(st.sampled_from([0.1, 0.9, 0.99]))] = -np.inf
        logits[draw(st.integers(0, 99))] = np.float32(offset)
    return logits


@settings(derandomize=True)
@given(
    logits=rows(),
    params=params_of_any_kind(),
    num_candidates=st.integers(1, 99),
    prompt=st.lists(st.integers(0, 99), max_size=6),
    output=st.lists(st.integers(0, 99), max_size=6),
    seed=st.integers(0, 2**64 - 1),
)
def test_what_candidates_decide_the_whole_row_decides_alike(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    num_candidates: int,
    prompt: list[int],
    output: list[int],
    seed: int,
) -> None:
    counts = counts_for(params, prompt, output)
    reduced = reduced_by_a_shard(logits, num_candidates, params.temperature)
    for position in range(5):
        sampled = from_candidates(reduced, params, counts, seed=seed, position=position)
        if not isinstance(sampled, InsufficientCandidates):
            assert sampled == sample_whole(logits, params, counts, seed=seed, position=position)


@settings(derandomize=True)
@given(logits=rows(), params=params_of_any_kind(), seed=st.integers(0, 2**64 - 1))
@example(logits=np.zeros(100, dtype=np.float32), params=SamplingParams(), seed=0)
def test_a_drawn_token_is_one_that_the_definitions_allow(
    logits: npt.NDArray[np.float32], params: SamplingParams, seed: int
) -> None:
    allowed = distribution(logits, params) > 0.0
    # On the edge of a cut the reference, which sums in another order, may decide otherwise.
    edge = {"top_p": min(1.0, params.top_p * (1 + 1e-6)), "min_p": params.min_p * (1 - 1e-6)}
    allowed |= distribution(logits, replace(params, **edge)) > 0.0
    assert allowed[sample_whole(logits, params, seed=seed).token_id]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
        SamplingParams(top_k=40),
        SamplingParams(top_k=40, top_p=0.9, min_p=0.05, temperature=0.7),
        SamplingParams(top_k=40, frequency_penalty=0.5, presence_penalty=0.5),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.05),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=0.7, repetition_penalty=1.1),
        SamplingParams(top_p=0.9, frequency_penalty=0.5, presence_penalty=0.5),
        SamplingParams(),
    ],
    ids=described,
)
def test_the_candidates_that_are_asked_for_nearly_always_decide(params: SamplingParams) -> None:
    """On rows as peaked as a small language model's: 3 % of the mass lies beyond the 128th token."""
    generator = np.random.default_rng(3)
    falling = 20.0 - 1.7 * np.log(np.arange(1, VOCAB_SIZE + 1))
    want = wanted_output(params, VOCAB_SIZE)
    assert want != WHOLE_ROW
    num_short = 0
    for index in range(10):
        logits = generator.permutation(falling + generator.normal(0, 0.3, VOCAB_SIZE)).astype(np.float32)
        likeliest = np.argsort(-logits)[:10].tolist()
        counts = counts_for(params, likeliest, likeliest[5:8])
        reduced = reduced_by_a_shard(logits, want.num_candidates, want.temperature)
        for position in range(50):
            sampled = from_candidates(reduced, params, counts, seed=index, position=position)
            num_short += isinstance(sampled, InsufficientCandidates)
    assert num_short <= 0.06 * 500
    if params.greedy or params.top_k:
        assert num_short == 0


def test_a_draw_beyond_the_candidates_needs_the_whole_row_and_gets_a_token_beyond_them() -> None:
    logits = np.zeros(1_000, dtype=np.float32)
    reduced, params = candidates(logits, 100, 1.0), SamplingParams()
    for position in range(200):
        number = uniform(0, 0, position)
        sampled = from_candidates(reduced, params, position=position)
        assert isinstance(sampled, InsufficientCandidates) == (number >= 0.1)
        assert sample_whole(logits, params, position=position).token_id == int(number * 1_000)


def test_top_p_is_decided_without_a_whole_row_where_the_draw_is_certain_though_the_cut_is_not() -> None:
    logits = np.zeros(1_000, dtype=np.float32)
    reduced, params = candidates(logits, 100, 1.0), SamplingParams(top_p=0.5)
    decided = [
        not isinstance(from_candidates(reduced, params, position=position), InsufficientCandidates)
        for position in range(500)
    ]
    assert 0.15 < np.mean(decided) < 0.25  # 100 of the 500 that are kept


def test_a_token_beyond_the_candidates_that_crosses_top_p_counts() -> None:
    logits, params = np.zeros(2, dtype=np.float32), SamplingParams(top_p=0.6)
    reduced = candidates(logits, 1, 1.0)
    for position in range(200):
        sampled = from_candidates(reduced, params, position=position)
        whole = sample_whole(logits, params, position=position)
        assert whole.token_id == (uniform(0, 0, position) >= 0.5)
        assert isinstance(sampled, InsufficientCandidates) or sampled == whole


def test_a_candidate_lowered_to_the_level_of_the_last_may_rank_behind_tokens_beyond_them() -> None:
    logits = np.array([1.0, 1.0, 1.0, 2.0], dtype=np.float32)
    params = SamplingParams(top_k=2, logit_bias={3: -1.0})
    reduced = candidates(logits, 2, 1.0)
    assert reduced.token_ids.tolist() == [[3, 0]]
    for position in range(50):
        assert isinstance(from_candidates(reduced, params, position=position), InsufficientCandidates)
        assert sample_whole(logits, params, position=position).token_id in (0, 1)


def test_candidates_that_shaping_makes_equal_rank_by_id() -> None:
    logits = np.array([1.5, 0.0, 0.0, 2.0], dtype=np.float32)
    params = SamplingParams(temperature=0.0, logit_bias={3: -0.5})
    sampled = from_candidates(candidates(logits, 3, 0.0), params)
    assert sampled == sample_whole(logits, params) == Sampled(0, None, ())


def test_very_cold_candidates_decide_though_their_log_sum_exp_says_nothing() -> None:
    logits = np.random.default_rng(0).normal(0, 3, VOCAB_SIZE).astype(np.float32)
    for temperature in (1e-300, 1e-40, 1e-5, 1e-3):
        params = SamplingParams(temperature=temperature)
        sampled = from_candidates(reduced_by_a_shard(logits, 128, temperature), params)
        assert isinstance(sampled, Sampled)
        assert sampled.token_id == int(logits.argmax())


@pytest.mark.parametrize(
    ("params", "num_candidates", "with_log_sum_exp"),
    [
        (SamplingParams(temperature=0.0), 1, False),
        (SamplingParams(temperature=0.0, top_k=40, top_p=0.9), 1, False),
        (SamplingParams(temperature=0.0, logprobs=0), 1, True),
        (SamplingParams(temperature=0.0, logprobs=5), 5, True),
        (SamplingParams(temperature=0.0, repetition_penalty=1.1), 65, False),
        (SamplingParams(temperature=0.0, repetition_penalty=0.9), 0, False),
        (SamplingParams(top_k=40), 40, False),
        (SamplingParams(top_k=3, logprobs=20), 20, True),
        (SamplingParams(top_k=WHOLE_ROW_ABOVE), WHOLE_ROW_ABOVE, False),
        (SamplingParams(top_k=WHOLE_ROW_ABOVE + 1), 0, False),
        (SamplingParams(top_k=40, presence_penalty=1.0), 104, False),
        (SamplingParams(top_k=40, presence_penalty=-1.0), 0, False),
        (SamplingParams(top_k=40, logit_bias={1: -1.0}), 104, False),
        (SamplingParams(top_k=40, logit_bias={1: 1.0}), 0, False),
        (SamplingParams(), 128, True),
        (SamplingParams(top_p=0.9), 128, True),
        (SamplingParams(min_p=0.1, logprobs=3), 128, True),
        (SamplingParams(presence_penalty=1.0), 192, True),
        (SamplingParams(repetition_penalty=1.1, logprobs=3), 192, True),
        (SamplingParams(presence_penalty=-1.0), 0, False),
    ],
    ids=described,
)
def test_the_least_is_asked_for(params: SamplingParams, num_candidates: int, with_log_sum_exp: bool) -> None:
    want = wanted_output(params, VOCAB_SIZE)
    assert (want.num_candidates, want.log_sum_exp) == (num_candidates, with_log_sum_exp)


def test_a_shard_grants_as_many_candidates_as_are_ever_asked_for() -> None:
    assert max(WHOLE_ROW_ABOVE, MORE_CANDIDATES) <= MAX_CANDIDATES


def test_a_small_vocabulary_comes_whole_where_that_is_no_more() -> None:
    assert wanted_output(SamplingParams(), 256) == WHOLE_ROW
    assert wanted_output(SamplingParams(), 257) != WHOLE_ROW


def test_wants_group_by_what_the_shard_is_asked() -> None:
    first, second = (wanted_output(SamplingParams(temperature=value), VOCAB_SIZE) for value in (0.5, 0.5))
    assert len({first, second}) == 1
