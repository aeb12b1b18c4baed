"""What a lease never wrote, none of its rows may read: blocks come with their former owner's K/V in them."""

import numpy as np
import pytest

from stagecoach.errors import OutOfRange
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.leases.lease import Lease
from stagecoach_shard.leases.written_positions import WrittenPositions


def make_lease(**changes):
    facts = {
        "first_block": 100,
        "num_blocks": 8,
        "block_size": 4,
        "max_slots": 3,
        "context_length": 24,
        "max_batch_tokens": 16,
    }
    return Lease(7, 5, **(facts | changes))


def header(step, rows, updates=()):
    return pb.MicroBatchHeader(
        epoch=5,
        step=step,
        row_slots=[row[0] for row in rows],
        row_starts=[row[1] for row in rows],
        row_num_tokens=[row[2] for row in rows],
        block_table_updates=[
            pb.BlockTableUpdate(slot=slot, first=first, block_ids=ids) for slot, first, ids in updates
        ],
    )


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_a_first_row_begins_at_the_beginning(start):
    with pytest.raises(OutOfRange, match="0 was never written") as caught:
        make_lease().accept(header(1, [(0, start, 1)], [(0, 0, [0, 1, 2])]))
    assert (caught.value.field, caught.value.limit) == ("row_starts", "0")


def test_a_table_that_is_swapped_for_unwritten_blocks_reads_nothing():
    lease = make_lease()
    lease.accept(header(1, [(0, 0, 8)], [(0, 0, [0, 1])]))
    with pytest.raises(OutOfRange, match="4 was never written"):
        lease.accept(header(2, [(0, 8, 1)], [(0, 1, [2, 3])]))


def test_a_block_that_is_begun_is_read_as_far_as_it_was_written():
    lease = make_lease()
    lease.accept(header(1, [(0, 0, 6)], [(0, 0, [0, 1])]))
    with pytest.raises(OutOfRange, match="6 was never written"):
        lease.accept(header(2, [(1, 7, 1)], [(1, 0, [0, 1])]))
    lease.accept(header(2, [(1, 6, 1)]))


def test_a_prefix_may_be_shared_also_with_a_row_of_the_same_step_that_comes_later():
    lease = make_lease()
    rows = lease.accept(header(1, [(1, 4, 2), (0, 0, 5)], [(0, 0, [0, 1]), (1, 0, [0, 2])]))
    assert rows.block_tables.tolist() == [[100, 102], [100, 101]]


def test_going_back_is_allowed_and_so_is_going_on_from_there():
    lease = make_lease()
    lease.accept(header(1, [(0, 0, 8)], [(0, 0, [0, 1])]))
    for step, start in enumerate((2, 3, 7), start=2):
        assert lease.accept(header(step, [(0, start, 1)])).starts.tolist() == [start]


def test_a_refused_step_writes_nothing():
    lease = make_lease()
    with pytest.raises(OutOfRange):
        lease.accept(header(1, [(0, 0, 8), (1, 4, 1)], [(0, 0, [0, 1]), (1, 0, [2, 3])]))
    with pytest.raises(OutOfRange, match="0 was never written"):
        lease.accept(header(1, [(0, 8, 1)], [(0, 2, [2])]))


def test_a_decode_looks_at_nothing_before_it(monkeypatch):
    written = WrittenPositions(first_block=100, num_blocks=4, block_size=4, max_slots=2)

    def row(start, num_tokens):
        tables = np.array([[100, 101, 102]], dtype=np.int32)
        starts, counts = np.array([start]), np.array([num_tokens])
        return Batch.build(starts=starts, num_tokens=counts, block_tables=tables, block_size=4)

    slots = np.array([0])
    assert written.write(slots, row(0, 9)) is None
    monkeypatch.setattr(WrittenPositions, "_first_unwritten", lambda *_: pytest.fail("looked"))
    for position in range(9, 12):
        assert written.write(slots, row(position, 1)) is None


def test_more_updates_than_slots_can_need_are_refused_before_any_is_applied():
    lease = make_lease()
    with pytest.raises(OutOfRange) as caught:
        lease.accept(header(1, [(0, 0, 1)], [(0, 0, [0])] * 13))
    assert caught.value.field == "block_table_updates"
