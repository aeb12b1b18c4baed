"""A lease lets a router touch its own blocks and nothing else, in order and in one epoch."""

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument, KVCacheFull, OutOfRange, StaleEpoch
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.leases.block_ranges import BlockRanges
from stagecoach_shard.leases.lease import Lease


def make_lease(**changes):
    facts = {
        "first_block": 100,
        "num_blocks": 8,
        "block_size": 4,
        "max_slots": 3,
        "context_length": 20,
        "max_batch_tokens": 16,
    }
    return Lease(7, 5, **(facts | changes))


def header(step=1, rows=((0, 0, 3),), block_table_updates=((0, 0, [0, 1]),), epoch=5):
    return pb.MicroBatchHeader(
        epoch=epoch,
        step=step,
        row_slots=[row[0] for row in rows],
        row_starts=[row[1] for row in rows],
        row_num_tokens=[row[2] for row in rows],
        block_table_updates=[
            pb.BlockTableUpdate(slot=slot, first=first, block_ids=ids) for slot, first, ids in block_table_updates
        ],
    )


def test_rows_name_blocks_in_the_shards_cache():
    rows = make_lease().accept(header(rows=[(0, 0, 5), (2, 0, 2)], block_table_updates=[(0, 0, [3, 1]), (2, 0, [7])]))
    assert rows.starts.tolist() == [0, 0]
    assert rows.num_tokens.tolist() == [5, 2]
    assert rows.block_tables[0].tolist() == [103, 101]
    assert rows.block_tables[1][0] == 107


def test_an_update_appends_to_the_table_that_is_there():
    lease = make_lease()
    lease.accept(header(block_table_updates=[(1, 0, [2])], rows=[(1, 0, 4)]))
    rows = lease.accept(header(step=2, block_table_updates=[(1, 1, [5])], rows=[(1, 4, 1)]))
    assert rows.block_tables.tolist() == [[102, 105]]


def test_an_update_from_zero_forgets_the_former_table():
    lease = make_lease()
    lease.accept(header(block_table_updates=[(1, 0, [2, 3])], rows=[(1, 0, 8)]))
    with pytest.raises(OutOfRange, match="need 2 blocks, its table has 1"):
        lease.accept(header(step=2, block_table_updates=[(1, 0, [4])], rows=[(1, 4, 1)]))


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (header(rows=[(3, 0, 1)]), "row_slots"),
        (header(block_table_updates=[(3, 0, [0])]), "block_table_updates.slot"),
        (header(block_table_updates=[(0, 0, [8])]), "block_table_updates.block_ids"),
        (header(block_table_updates=[(0, 1, [0])]), "block_table_updates.first"),
        (header(block_table_updates=[(0, 0, [0] * 6)]), "block_table_updates.first"),
        (header(rows=[(0, 18, 3)], block_table_updates=[(0, 0, [0] * 5)]), "row_starts"),
        (header(rows=[(0, 0, 17)], block_table_updates=[(0, 0, [0] * 5)]), "row_num_tokens"),
        (header(rows=[(0, 8, 1)]), "row_starts"),
    ],
)
def test_what_is_not_the_leases_is_out_of_range(bad, field):
    with pytest.raises(OutOfRange) as caught:
        make_lease().accept(bad)
    assert caught.value.field == field
    assert caught.value.limit


@pytest.mark.parametrize("rows", [[], [(0, 0, 0)], [(0, 0, 1), (0, 1, 1)]])
def test_rows_that_make_no_sense_are_invalid(rows):
    with pytest.raises(InvalidArgument):
        make_lease().accept(header(rows=rows))


@pytest.mark.parametrize(
    "lengths", [{"row_starts": []}, {"row_num_tokens": [1]}, {"row_slots": [0, 1, 2]}, {"row_starts": [0, 0, 0]}]
)
def test_rows_whose_parts_are_not_of_one_number_are_invalid(lengths):
    facts = {"row_slots": [0, 1], "row_starts": [0, 0], "row_num_tokens": [1, 1]} | lengths
    with pytest.raises(InvalidArgument) as caught:
        make_lease().accept(pb.MicroBatchHeader(epoch=5, step=1, **facts))
    assert caught.value.field == "row_slots"


@pytest.mark.parametrize("changes", [{"epoch": 4}, {"epoch": 6}, {"step": 2}, {"step": 0}])
def test_another_epoch_or_a_gap_in_the_steps_is_refused(changes):
    with pytest.raises(StaleEpoch):
        make_lease().accept(header(**changes))


def test_a_lease_of_too_many_slots_is_refused():
    with pytest.raises(InvalidArgument, match="max_slots"):
        make_lease(max_slots=5000)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=40))
def test_ranges_never_overlap_and_nothing_is_lost(steps):
    ranges = BlockRanges(30)
    held = {}
    for take, size in steps:
        if take:
            try:
                first = ranges.allocate(size)
            except KVCacheFull:
                continue
            held[first] = size
        elif held:
            first = next(iter(held))
            ranges.free(first)
            del held[first]
        owners = np.zeros(30, dtype=int)
        for first, size in held.items():
            owners[first : first + size] += 1
        assert owners.max(initial=0) <= 1
        free_runs = "".join(map(str, owners)).split("1")
        assert ranges.num_free == max(map(len, free_runs))


def test_slots_that_nobody_uses_take_no_memory():
    """A small message may ask for thousands of them, and for as many leases as there are blocks."""
    before = psutil.Process().memory_info().rss
    leases = [make_lease(max_slots=4096, context_length=1 << 17, block_size=16) for _ in range(8)]
    grown = psutil.Process().memory_info().rss - before
    assert len(leases) == 8
    assert grown < 64 << 20, "tables of 8 x 128 MiB"


def test_a_lease_of_few_blocks_has_no_tables_for_more_whatever_context_a_checkpoint_claims():
    lease = make_lease(num_blocks=1, max_slots=4096, context_length=2**31 - 1, block_size=1)  # 32 TiB of numbers
    with pytest.raises(OutOfRange) as caught:
        lease.accept(header(rows=((0, 0, 2),), block_table_updates=((0, 0, [0, 0]),)))
    assert (caught.value.field, caught.value.limit) == ("block_table_updates.first", "1")
