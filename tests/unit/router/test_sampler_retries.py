"""Where candidates do not determine a token, more are asked for, then the whole row; the token stays the same."""

from __future__ import annotations

import numpy as np
import pytest

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.outputs import (
    MORE_CANDIDATES,
    OPEN_CANDIDATES,
    WHOLE_ROW,
    InsufficientCandidates,
    OutputWant,
    wanted_output,
    wider_output,
)
from tests.unit.router.sampling_reference import candidates, sample, sample_whole

VOCAB_SIZE = 49_152


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9, logprobs=3)])
def test_open_sampling_asks_for_more_candidates_before_the_whole_row(params: SamplingParams) -> None:
    first = wanted_output(params, VOCAB_SIZE)
    second = wider_output(first, VOCAB_SIZE)
    assert (first.num_candidates, second.num_candidates) == (OPEN_CANDIDATES, MORE_CANDIDATES)
    assert second == OutputWant(MORE_CANDIDATES, True, params.temperature)
    assert wider_output(second, VOCAB_SIZE) == WHOLE_ROW


def test_where_more_candidates_would_be_most_of_the_row_the_row_is_next() -> None:
    assert wider_output(wanted_output(SamplingParams(), 2_000), 2_000) == WHOLE_ROW


def test_candidates_that_penalties_lowered_are_followed_by_the_row() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=1.0)
    assert wider_output(wanted_output(params, VOCAB_SIZE), VOCAB_SIZE) == WHOLE_ROW


@pytest.mark.parametrize("params", [SamplingParams(temperature=1.4), SamplingParams(temperature=2.0, top_p=0.95)])
def test_the_first_answer_that_determines_the_token_gives_that_of_the_whole_row(params: SamplingParams) -> None:
    logits = np.random.default_rng(1).normal(0.0, 2.5, VOCAB_SIZE).astype(np.float32)
    first = wanted_output(params, VOCAB_SIZE)
    wants = (first, wider_output(first, VOCAB_SIZE))
    answers = [candidates(logits, want.num_candidates, params.temperature) for want in wants]
    decided = [0, 0, 0]
    for position in range(300):
        for index, answer in enumerate(answers):
            sampled = sample(answer, params, None, seed=3, completion=0, position=position)
            if not isinstance(sampled, InsufficientCandidates):
                assert sampled == sample_whole(logits, params, seed=3, position=position)
                decided[index] += 1
                break
        else:
            decided[2] += 1
    assert all(count > 0 for count in decided)  # each of the three was needed
