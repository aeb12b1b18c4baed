"""Bias and penalties: counted right, applied as defined, and alike to rows and to candidates."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.penalties import TokenCounts, only_lowers, shape_candidates, shape_row
from tests.unit.router.sampling_reference import counts_of

VOCAB_SIZE = 500

token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=150)


def row() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(5).normal(0, 5, VOCAB_SIZE).astype(np.float32)


@given(prompt=token_lists, output=token_lists, look_every=st.integers(1, 200))
def test_counts_are_those_of_the_tokens_however_often_they_are_read(
    prompt: list[int], output: list[int], look_every: int
) -> None:
    log: list[int] = []
    counts = TokenCounts(prompt, log)
    for index, token_id in enumerate(output):
        log.append(token_id)
        if index % look_every == 0:
            counts.arrays()
    token_ids, num_output = counts.arrays()
    assert token_ids.tolist() == list(dict.fromkeys(prompt + output))
    occurrences = Counter(output)
    assert num_output.tolist() == [occurrences[token_id] for token_id in token_ids.tolist()]


def test_the_prompt_may_change_hands_after_it_was_counted() -> None:
    assert counts_of((), ()).arrays()[0].tolist() == []
    assert counts_of((4, 4, 2), (2, 9)).arrays()[1].tolist() == [0.0, 1.0, 1.0]


def test_places_say_where_a_token_is_counted() -> None:
    assert counts_of((4, 2), (9,)).places([9, 3, 4]).tolist() == [2, -1, 0]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, prompt, output = row(), [1, 2, 3, 3, 77], [3, 8, 499]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), torch.from_numpy(logits)[None])
    ours = shape_row(logits, SamplingParams(repetition_penalty=penalty), counts_of(prompt, output))
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=2e-7)


def test_presence_and_frequency_count_the_output_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    shaped = shape_row(np.zeros(10, dtype=np.float32), params, counts_of([1, 2], [2, 3, 3, 3]))
    assert shaped.tolist() == [0, 0, -0.75, -1.25, 0, 0, 0, 0, 0, 0]


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_others() -> None:
    params = SamplingParams(logit_bias={0: 3.0, 1: -3.0, 2: 7.0}, repetition_penalty=2.0, presence_penalty=0.5)
    shaped = shape_row(np.ones(4, dtype=np.float32), params, counts_of([], [0, 1]))
    assert shaped.tolist() == [(1 + 3) / 2 - 0.5, (1 - 3) * 2 - 0.5, 8.0, 1.0]


def test_masked_logits_stay_masked_and_the_row_itself_as_it_was() -> None:
    logits = np.full(4, -np.inf, dtype=np.float32)
    params = SamplingParams(logit_bias={0: 5.0}, repetition_penalty=1.5, frequency_penalty=-1.0)
    assert shape_row(logits, params, counts_of([1], [2])).tolist() == [-np.inf] * 4
    logits = np.ones(4, dtype=np.float32)
    shape_row(logits, params, counts_of([1], [2]))
    assert logits.tolist() == [1.0] * 4


@given(
    prompt=token_lists,
    output=token_lists,
    bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-9, 9), max_size=20),
    repetition=st.floats(0.1, 3.0),
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
)
def test_candidates_are_shaped_as_the_row_is_to_the_bit(
    prompt: list[int], output: list[int], bias: dict[int, float], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        logit_bias=bias, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    logits, counts = row(), counts_of(prompt, output)
    ids = np.random.default_rng(len(prompt)).permutation(VOCAB_SIZE)[:100].astype(np.int32)
    shaped = shape_row(logits, params, counts)
    assert shape_candidates(ids, logits[ids], params, counts).tolist() == shaped[ids].tolist()
    if only_lowers(params):
        assert (shaped <= logits).all()


@pytest.mark.parametrize(
    ("params", "lowers"),
    [
        (SamplingParams(), True),
        (
            SamplingParams(repetition_penalty=1.2, presence_penalty=1.0, frequency_penalty=1.0, logit_bias={1: -1.0}),
            True,
        ),
        (SamplingParams(repetition_penalty=0.9), False),
        (SamplingParams(presence_penalty=-0.1), False),
        (SamplingParams(frequency_penalty=-0.1), False),
        (SamplingParams(logit_bias={1: -1.0, 2: 0.1}), False),
    ],
    ids=repr,
)
def test_what_only_lowers_logits_is_known(params: SamplingParams, lowers: bool) -> None:
    assert only_lowers(params) is lowers
