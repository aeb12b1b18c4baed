"""uniform(): a number for each (seed, completion, position, stream), and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stagecoach_router.sampling.randomness import uniform

_uint64 = st.integers(0, 2**64 - 1)


@given(seed=_uint64, completion=_uint64, position=_uint64, stream=_uint64)
def test_is_a_multiple_of_2_to_the_minus_53_from_0_to_below_1(
    seed: int, completion: int, position: int, stream: int
) -> None:
    number = uniform(seed, completion, position, stream)
    assert 0.0 <= number < 1.0
    assert (number * 2**53).is_integer()
    assert number == uniform(seed, completion, position, stream)


def test_known_values_stay_as_they_are() -> None:
    # A replay on another version of the router has to draw the same tokens.
    assert uniform(0, 0, 0) == 0.9688867204968363
    assert uniform(2**64 - 1, 3, 4096, 1) == 0.1756341803813708


@pytest.mark.parametrize("counter", ["seed", "completion", "position", "stream"])
def test_every_counter_gives_independent_uniform_numbers(counter: str) -> None:
    rest = {"seed": 11, "completion": 0, "position": 7, "stream": 0}
    numbers = np.array([uniform(**{**rest, counter: value}) for value in range(20_000)])
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    # Neighbours fall into the cells of a grid as often as one another: no correlation from one value to the next.
    cells, _, _ = np.histogram2d(numbers[0::2], numbers[1::2], bins=10, range=[[0, 1], [0, 1]])
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


def test_counters_are_not_interchangeable() -> None:
    numbers = {uniform(1, 2, 3, 4), uniform(2, 1, 3, 4), uniform(1, 3, 2, 4), uniform(1, 2, 4, 3), uniform(4, 3, 2, 1)}
    assert len(numbers) == 5


def test_low_bits_are_random_too() -> None:
    bits = [int(uniform(5, 0, position) * 2**53) & 1 for position in range(20_000)]
    assert stats.binomtest(sum(bits), len(bits)).pvalue > 1e-4
