"""A step's rows chosen together get what each of them gets by itself; and where it counts, they are chosen together."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach.errors import ShardFault
from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling import sampler
from stagecoach_router.sampling.outputs import CandidateRows, InsufficientCandidates, Sampled, WholeRows, wanted_output
from stagecoach_router.sampling.sampler import Choice, choose_tokens
from stagecoach_router.scheduling.sequence import Sequence

VOCAB_SIZE = 2000


def sequence(params: SamplingParams, seed: int, prompt: Many[int] = (1, 2, 3)) -> Sequence:
    return Sequence(seq_id=seed, prompt_tokens=tuple(prompt), params=params, seed=seed)


def each_by_itself(outputs: CandidateRows | WholeRows, sequences: Many[Sequence]) -> list[Choice]:
    return [choose_tokens(outputs.take([index]), [one])[0] for index, one in enumerate(sequences)]


def candidate_rows(
    params: Many[SamplingParams], k: int, *, log_sum_exp: bool, spread: float, coarse: bool, seed: int
) -> CandidateRows:
    """Of as many random rows of a vocabulary, reduced as a shard would."""
    logits = np.random.default_rng(seed).normal(3.0, spread, (len(params), VOCAB_SIZE)).astype(np.float32)
    if coarse:
        logits = np.round(logits * 2) / 2
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    plain = scaled = None
    if log_sum_exp:
        temperatures = np.array([max(one.temperature, 1e-3) for one in params])[:, None]
        plain, scaled = (np.logaddexp.reduce(x.astype(np.float64), axis=1) for x in (logits, logits / temperatures))
        plain, scaled = plain.astype(np.float32), scaled.astype(np.float32)
    return CandidateRows(ids.astype(np.int32), np.take_along_axis(logits, ids, axis=1), plain, scaled)


@st.composite
def params_of_one_group(draw: st.DrawFn) -> tuple[list[SamplingParams], int, bool]:
    """Parameters of rows that ask for the same candidates: mostly plain ones, some with what needs more."""
    top_k = draw(st.sampled_from([0, 1, 2, 7, 50]))
    one = st.builds(
        SamplingParams,
        temperature=st.sampled_from([1e-35, 0.01, 0.7, 1.0, 5.0]) | st.floats(0.001, 100.0),
        top_k=st.just(top_k),
        top_p=st.sampled_from([1.0, 0.9, 0.5]) | st.floats(0.0, 1.0, exclude_min=True),
        min_p=st.sampled_from([0.0, 0.05, 1.0]) | st.floats(0.0, 1.0),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 1.5]),
        logprobs=st.none() if top_k else st.sampled_from([None, None, 2]),
    )
    return draw(st.lists(one, min_size=1, max_size=12)), top_k or 64, not top_k


@settings(derandomize=True)
@given(
    group=params_of_one_group(),
    spread=st.sampled_from([0.0, 0.3, 2.0, 8.0]),
    coarse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_rows_together_get_what_each_gets_by_itself(
    group: tuple[list[SamplingParams], int, bool], spread: float, coarse: bool, seed: int
) -> None:
    params, k, log_sum_exp = group
    outputs = candidate_rows(params, k, log_sum_exp=log_sum_exp, spread=spread, coarse=coarse, seed=seed)
    sequences = [sequence(one, seed + index) for index, one in enumerate(params)]
    assert choose_tokens(outputs, sequences) == each_by_itself(outputs, sequences)


@pytest.mark.parametrize(
    ("params", "k"),
    [
        (SamplingParams(temperature=0.0), 1),
        (SamplingParams(top_k=1), 1),
        (SamplingParams(top_k=50, top_p=0.9), 50),
        (SamplingParams(temperature=0.7, top_p=0.9), 128),
        (SamplingParams(temperature=0.7, min_p=0.05), 128),
    ],
    ids=["greedy", "top-k 1", "top-k 50", "top-p", "min-p"],
)
def test_the_usual_rows_are_chosen_together(monkeypatch: pytest.MonkeyPatch, params: SamplingParams, k: int) -> None:
    want = wanted_output(params, VOCAB_SIZE)
    assert want.num_candidates == k
    outputs = candidate_rows([params] * 32, k, log_sum_exp=want.log_sum_exp, spread=8.0, coarse=False, seed=1)
    sequences = [sequence(params, seed) for seed in range(32)]
    num_rows_drawn: list[int] = []

    def draw(weights: Any, *given: Any) -> Any:
        num_rows_drawn.append(len(weights))
        return sampler_draw(weights, *given)

    sampler_draw = sampler.draw
    monkeypatch.setattr(sampler, "draw", draw)
    choices = choose_tokens(outputs, sequences)
    assert num_rows_drawn == ([] if k == 1 else [32])
    assert sum(isinstance(choice, Sampled) for choice in choices) >= 30


def test_a_row_without_numbers_is_its_own_fault_only() -> None:
    for params, k in ((SamplingParams(temperature=0.0), 1), (SamplingParams(), 128), (SamplingParams(top_k=5), 5)):
        rows = [params] * 8
        outputs = candidate_rows(rows, k, log_sum_exp=k == 128, spread=8.0, coarse=False, seed=2)
        outputs.logits[3] = np.nan
        choices = choose_tokens(outputs, [sequence(params, seed) for seed in range(8)])
        assert [isinstance(choice, ShardFault) for choice in choices] == [index == 3 for index in range(8)]


def test_candidates_above_their_rows_log_sum_exp_are_a_fault() -> None:
    params = SamplingParams()
    outputs = candidate_rows([params] * 8, 128, log_sum_exp=True, spread=8.0, coarse=False, seed=2)
    assert outputs.scaled_log_sum_exp is not None
    outputs.scaled_log_sum_exp[5] = -100.0
    choices = choose_tokens(outputs, [sequence(params, seed) for seed in range(8)])
    assert [isinstance(choice, ShardFault) for choice in choices] == [index == 5 for index in range(8)]


@pytest.mark.parametrize("huge", [1e9, 1e12, 3e38])
def test_logits_as_large_as_numbers_get_leave_the_others_their_tokens(huge: float) -> None:
    params = [SamplingParams(temperature=0.7)] * 8
    outputs = candidate_rows(params, 64, log_sum_exp=True, spread=2.0, coarse=False, seed=1)
    sequences = [sequence(one, index) for index, one in enumerate(params)]
    expected = choose_tokens(outputs, sequences)
    assert outputs.scaled_log_sum_exp is not None
    outputs.logits[3, 0] = outputs.scaled_log_sum_exp[3] = huge
    with np.errstate(over="ignore"):
        outputs.scaled_log_sum_exp[3] /= np.float32(0.7)
    choices = choose_tokens(outputs, sequences)
    assert isinstance(choices[3], Sampled | InsufficientCandidates | ShardFault)
    assert choices[:3] + choices[4:] == expected[:3] + expected[4:]


def test_whole_rows_are_sampled_from_as_they_are() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (3, VOCAB_SIZE)).astype(np.float32)
    params = SamplingParams(presence_penalty=-1.0)
    sequences = [sequence(params, seed) for seed in range(3)]
    outputs = WholeRows(logits)
    assert choose_tokens(outputs, sequences) == each_by_itself(outputs, sequences)


def test_taking_rows_keeps_their_arrays_together() -> None:
    params = [SamplingParams(temperature=1.0 + index) for index in range(6)]
    outputs = candidate_rows(params, 64, log_sum_exp=True, spread=2.0, coarse=False, seed=3)
    sequences = [sequence(one, seed) for seed, one in enumerate(params)]
    some = [1, 2, 3, 5]
    whole = choose_tokens(outputs, sequences)
    assert choose_tokens(outputs.take(some), [sequences[index] for index in some]) == [whole[index] for index in some]
