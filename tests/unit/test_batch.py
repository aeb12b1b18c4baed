"""A micro-batch's rows become positions and cache slots, or an error that names the field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach_shard.attention.batch import Batch

CPU = torch.device("cpu")


def _build(starts: list[int], num_tokens: list[int], tables: list[list[int]], block_size: int = 4) -> Batch:
    return Batch.build(
        starts=np.array(starts, dtype=np.int64),
        num_tokens=np.array(num_tokens, dtype=np.int64),
        block_tables=np.array(tables, dtype=np.int32),
        block_size=block_size,
        device=CPU,
    )


def test_tokens_go_to_the_blocks_of_their_row() -> None:
    batch = _build([3, 0], [3, 2], [[7, 2, -1], [5, 99, 99]])
    assert batch.positions.tolist() == [3, 4, 5, 0, 1]
    assert batch.cache_slots.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 5 * 4, 5 * 4 + 1]
    assert (batch.total_tokens, batch.max_position, batch.max_block) == (5, 5, 7)


def test_a_block_is_begun_where_its_first_position_is_written_and_its_last_is_not() -> None:
    #                        begun: 1           filled    went on     begun: 8
    batch = _build([0, 4, 5, 6], [6, 4, 2, 3], [[0, 1, 2], [3, 4, 5], [3, 6, 5], [3, 7, 8]])
    assert batch.begun_blocks is not None
    assert batch.begun_blocks.tolist() == [1, 8]
    assert _build([4], [4], [[0, 1]]).begun_blocks is None


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=6),
    block_size=st.integers(1, 9),
)
def test_slots_follow_from_positions_for_any_rows(rows: list[tuple[int, int]], block_size: int) -> None:
    tables = np.random.default_rng(0).permutation(len(rows) * 61).reshape(len(rows), 61)
    batch = _build([start for start, _ in rows], [count for _, count in rows], tables.tolist(), block_size)
    expected = [
        (position, int(tables[row, position // block_size]) * block_size + position % block_size)
        for row, (start, count) in enumerate(rows)
        for position in range(start, start + count)
    ]
    assert list(zip(batch.positions.tolist(), batch.cache_slots.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("starts", "num_tokens", "tables", "field"),
    [
        ([], [], [], "row_num_tokens"),
        ([0, 0], [1], [[0]], "row_num_tokens"),
        ([0], [0], [[0]], "row_num_tokens"),
        ([-1], [2], [[0]], "row_starts"),
        ([0], [5], [[0]], "block_tables"),
        ([0], [5], [[0, -1]], "block_tables"),
        ([0], [1], [[0], [1]], "block_tables"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    starts: list[int], num_tokens: list[int], tables: list[list[int]], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _build(starts, num_tokens, tables)
    assert caught.value.field == field
