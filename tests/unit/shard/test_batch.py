"""A micro-batch's rows become positions and cache slots."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_shard.attention.batch import Batch


def _build(starts: list[int], num_tokens: list[int], tables: list[list[int]], block_size: int = 4) -> Batch:
    return Batch.build(
        starts=np.array(starts, dtype=np.int64),
        num_tokens=np.array(num_tokens, dtype=np.int64),
        block_tables=np.array(tables, dtype=np.int32),
        block_size=block_size,
    )


def test_tokens_go_to_the_blocks_of_their_row() -> None:
    batch = _build([3, 0], [3, 2], [[7, 2, -1], [5, 99, 99]])
    assert batch.positions.tolist() == [3, 4, 5, 0, 1]
    assert batch.cache_slots.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 5 * 4, 5 * 4 + 1]
    assert batch.total_tokens == 5
    assert batch.ends.tolist() == [6, 2]


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


def test_it_moves_to_a_device_once_and_what_decides_shapes_stays() -> None:
    batch = _build([3, 0], [3, 2], [[7, 2, -1], [5, 99, 99]])
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.begun_blocks is not None
    assert {moved.device, moved.cache_slots.device, moved.begun_blocks.device} == {torch.device("meta")}
    assert moved.starts is batch.starts
    assert moved.to(torch.device("meta")) is moved
