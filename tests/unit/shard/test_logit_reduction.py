"""The last stage's reduction against a plain sort, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stagecoach_shard.runtime.logit_reduction import log_sum_exp, top_candidates

VOCAB_SIZE = 49_152


def sorted_whole(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """By definition: falling, equal logits by rising id."""
    values, ids = logits.float().sort(dim=1, descending=True, stable=True)
    return ids[:, :num_candidates].to(torch.int32), values[:, :num_candidates]


def rows(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn((num_rows, vocab_size), generator=generator) * 4).to(dtype)


def assert_same(logits: Tensor, num_candidates: int) -> None:
    ids, values = top_candidates(logits, num_candidates)
    expected_ids, expected_values = sorted_whole(logits, num_candidates)
    assert ids.dtype == torch.int32
    assert values.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_candidates", [1, 2, 40, 128, 1024, 10_000])
def test_candidates_are_those_of_a_whole_sort(num_candidates: int, dtype: torch.dtype) -> None:
    assert_same(rows(3, VOCAB_SIZE, dtype), num_candidates)


@given(data=st.data(), vocab_size=st.integers(1, 700), num_levels=st.integers(1, 12))
def test_equal_logits_at_the_last_place_leave_the_lowest_ids(
    data: st.DataObject, vocab_size: int, num_levels: int
) -> None:
    levels = torch.tensor([-torch.inf, -2.0, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0])[-num_levels:]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    picked = torch.randint(0, num_levels, (2, vocab_size), generator=generator)
    assert_same(levels[picked], data.draw(st.integers(1, vocab_size + 3)))


def test_a_row_of_equal_logits_gives_the_first_ids() -> None:
    ids, _ = top_candidates(torch.zeros((2, VOCAB_SIZE), dtype=torch.bfloat16), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("num_candidates", [1, 40])
@pytest.mark.parametrize("vocab_size", [49_152, 50_257])
def test_a_view_of_other_rows_is_reduced_alike(vocab_size: int, num_candidates: int) -> None:
    logits = rows(6, vocab_size, torch.bfloat16)
    assert_same(logits[2:5], num_candidates)
    assert_same(logits[::2], num_candidates)


def test_a_row_is_reduced_the_same_whatever_is_beside_it() -> None:
    logits = rows(8, 5_000, torch.bfloat16)
    together = top_candidates(logits, 40)
    for index in range(len(logits)):
        alone = top_candidates(logits[index : index + 1], 40)
        assert torch.equal(alone[0][0], together[0][index])
        assert torch.equal(alone[1][0], together[1][index])


@pytest.mark.parametrize("num_candidates", [1, 5, 300, 5_000])
@pytest.mark.parametrize("num_nans", [1, 100, 5_000])
def test_a_nan_anywhere_in_a_row_comes_first_and_leaves_other_rows_alone(num_nans: int, num_candidates: int) -> None:
    logits = rows(2, 5_000, torch.float32)
    logits[1, -num_nans:] = torch.nan
    ids, values = top_candidates(logits, num_candidates)
    assert bool(values[1, 0].isnan())
    expected_ids, expected_values = sorted_whole(logits[:1], num_candidates)
    assert torch.equal(ids[:1], expected_ids)
    assert torch.equal(values[:1], expected_values)


class LargestResult(TorchDispatchMode):
    """Notes the most bytes in any one operation's result."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("value", [0.0, torch.nan, -torch.inf])
def test_rows_that_cannot_be_told_apart_take_no_more_than_others(value: float) -> None:
    """Hidden states of nothing, which a stage that lies may send, make every logit of a row the same."""
    logits = torch.full((4, VOCAB_SIZE), value)
    with LargestResult() as largest:
        top_candidates(logits, 128)
    assert largest.num_bytes <= logits.nbytes  # which a view of them has


@pytest.mark.parametrize("num_candidates", [1, 40])
def test_no_rows_give_no_rows(num_candidates: int) -> None:
    ids, values = top_candidates(torch.zeros((0, 100)), num_candidates)
    assert ids.shape == values.shape == (0, num_candidates)
    assert [len(part) for part in log_sum_exp(torch.zeros((0, 100)), torch.zeros(0))] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_is_right_to_float32_at_each_rows_temperature(dtype: torch.dtype) -> None:
    logits = rows(6, VOCAB_SIZE, dtype)
    temperatures = torch.tensor([1.0, 0.7, 0.1, 0.01, 2.0, 100.0])
    plain, scaled = log_sum_exp(logits, temperatures)
    exact = logits.double()
    np.testing.assert_allclose(plain, exact.logsumexp(1), rtol=3e-7)
    np.testing.assert_allclose(scaled, (exact / temperatures.double()[:, None]).logsumexp(1), rtol=3e-7)
    assert plain.dtype == scaled.dtype == torch.float32


def test_log_sum_exp_at_temperature_0_is_that_of_the_row() -> None:
    plain, scaled = log_sum_exp(rows(2, 100, torch.float32), torch.tensor([0.0, 0.5]))
    assert plain[0] == scaled[0]
    assert plain[1] != scaled[1]


def test_log_sum_exp_leaves_the_logits_as_they_are() -> None:
    logits = rows(2, 100, torch.float32)
    before = logits.clone()
    log_sum_exp(logits, torch.tensor([1.0, 0.5]))
    assert torch.equal(logits, before)


def test_log_sum_exp_does_not_overflow_and_counts_masked_tokens_as_nothing() -> None:
    logits = torch.tensor([[30_000.0, 30_000.0, -torch.inf, -30_000.0]])
    plain, scaled = log_sum_exp(logits, torch.tensor([0.5]))
    assert float(plain) == pytest.approx(30_000 + np.log(2), rel=1e-7)
    assert float(scaled) == pytest.approx(60_000 + np.log(2), rel=1e-7)


def test_log_sum_exp_of_a_broken_row_is_not_a_number() -> None:
    plain, scaled = log_sum_exp(torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), torch.tensor([0.5, 0.5]))
    assert plain.isnan().tolist() == scaled.isnan().tolist() == [True, False]
