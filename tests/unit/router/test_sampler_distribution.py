"""Tokens come as often as the definitions say: chi-square for each parameter, from whole rows and from candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.outputs import InsufficientCandidates
from stagecoach_router.sampling.randomness import uniform
from tests.unit.router.sampling_reference import candidates, counts_for, distribution, sample, sample_whole, whole

VOCAB_SIZE = 60
NUM_DRAWS = 5_000
# The draws are fixed by their seeds: a test passes always or never. All 44 cases of a correct sampler stay above this
# with all but one in 2,000 choices of seeds.
SIGNIFICANCE = 1e-5
PROMPT, OUTPUT = (3, 3, 14, 20, 41), (5, 14, 14, 14, 8, 5)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k 1": {"top_k": 1},
    "top_k beyond the vocabulary": {"top_k": 1_000},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-9},
    "min_p": {"min_p": 0.1},
    "min_p 1": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.6},
    "repetition below 1": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.2},
    "frequency": {"frequency_penalty": 0.7},
    "negative frequency": {"frequency_penalty": -0.5},
    "bias": {"logit_bias": {0: 4.0, 14: -3.0, 59: 2.5, 7: -1000.0}},
    "top_k and top_p": {"top_k": 12, "top_p": 0.85},
    "top_k, top_p and min_p": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.08},
    "top_p and min_p": {"top_p": 0.7, "min_p": 0.2, "temperature": 1.7},
    "penalties and top_k": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "top_k": 8},
    "bias, penalty and top_p": {"logit_bias": {3: 2.0}, "repetition_penalty": 1.4, "top_p": 0.75, "temperature": 0.8},
    "all": {
        "temperature": 1.4,
        "top_k": 25,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.3,
        "logit_bias": {5: 1.5, 20: -1.5},
    },
}


def row() -> np.ndarray[Any, np.dtype[np.float32]]:
    """With equal logits among them, as bfloat16 has."""
    return (np.random.default_rng(2).normal(0.5, 2.0, VOCAB_SIZE) * 4).round().astype(np.float32) / 4


def assert_fits(tokens: list[int], probabilities: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    seen = np.bincount(tokens, minlength=VOCAB_SIZE)
    assert not seen[probabilities == 0.0].any(), "a token that cannot be was drawn"
    expected = probabilities * len(tokens)
    common = expected >= 5
    if common.sum() + bool((~common).any()) < 2:
        return
    observed_cells, expected_cells = list(seen[common]), list(expected[common])
    if expected[~common].sum() > 0:
        observed_cells.append(seen[~common].sum())
        expected_cells.append(expected[~common].sum())
    if len(observed_cells) > 1:
        assert stats.chisquare(observed_cells, expected_cells).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("case", CASES)
def test_whole_rows_give_the_defined_distribution(case: str) -> None:
    params, logits = SamplingParams(**CASES[case]), row()
    counts = counts_for(params, PROMPT, OUTPUT)
    seed = list(CASES).index(case)
    tokens = [
        sample_whole(logits, params, counts, seed=seed, position=position).token_id for position in range(NUM_DRAWS)
    ]
    assert_fits(tokens, distribution(logits, params, PROMPT, OUTPUT))


@pytest.mark.parametrize("case", CASES)
def test_candidates_with_whole_rows_where_they_fall_short_give_it_too(case: str) -> None:
    params, logits = SamplingParams(**CASES[case]), row()
    counts = counts_for(params, PROMPT, OUTPUT)
    seed, tokens = 1_000 + list(CASES).index(case), []
    reduced = candidates(logits, 16, params.temperature)
    for position in range(NUM_DRAWS):
        sampled = sample(reduced, params, counts, seed=seed, completion=0, position=position)
        if isinstance(sampled, InsufficientCandidates):
            sampled = sample(whole(logits), params, counts, seed=seed, completion=0, position=position)
        assert not isinstance(sampled, InsufficientCandidates)
        tokens.append(sampled.token_id)
    assert_fits(tokens, distribution(logits, params, PROMPT, OUTPUT))


@pytest.mark.parametrize("case", CASES)
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(case: str) -> None:
    params, logits = SamplingParams(**CASES[case]), row()
    counts = counts_for(params, PROMPT, OUTPUT)
    probabilities = distribution(logits, params, PROMPT, OUTPUT)
    shaped_order = np.lexsort((np.arange(VOCAB_SIZE), -probabilities))
    ends = probabilities[shaped_order].cumsum()
    for position in range(300):
        number = uniform(9, 0, position)
        if np.abs(ends - number).min() < 1e-6:  # shaped logits are float32
            continue
        expected = shaped_order[ends.searchsorted(number, side="right")]
        drawn = sample_whole(logits, params, counts, seed=9, position=position).token_id
        assert probabilities[drawn] == pytest.approx(probabilities[expected], rel=1e-6)
        if np.count_nonzero(np.isclose(probabilities, probabilities[expected], rtol=1e-6)) == 1:
            assert drawn == expected


def test_this_test_can_tell_one_distribution_from_another() -> None:
    logits, near = row(), SamplingParams(temperature=1.1)
    tokens = [sample_whole(logits, SamplingParams(), position=position).token_id for position in range(NUM_DRAWS)]
    assert_fits(tokens, distribution(logits, SamplingParams()))
    with pytest.raises(AssertionError):
        assert_fits(tokens, distribution(logits, near))


def test_draws_of_neighbouring_positions_and_completions_are_independent() -> None:
    logits, params = np.zeros(8, dtype=np.float32), SamplingParams()

    def token(completion: int, position: int) -> int:
        sampled = sample(whole(logits), params, None, seed=4, completion=completion, position=position)
        assert not isinstance(sampled, InsufficientCandidates)
        return sampled.token_id

    by_position, by_completion = np.zeros((8, 8)), np.zeros((8, 8))
    for position in range(NUM_DRAWS):
        by_position[token(0, position), token(0, position + 1)] += 1
        by_completion[token(0, position), token(1, position)] += 1
    assert stats.chisquare(by_position.ravel()).pvalue > SIGNIFICANCE
    assert stats.chisquare(by_completion.ravel()).pvalue > SIGNIFICANCE
