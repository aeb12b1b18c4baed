"""A lease is what one router may use of a shard: a range of blocks, its slots' block tables, its steps in their order.

Block ids on the wire are relative to the lease, so a router can name no block but its own. Everything that comes from
the wire is checked here before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagecoach.errors import InvalidArgument, OutOfRange, StaleEpoch
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.leases.written_positions import WrittenPositions

MAX_SLOTS = 4096
# In one micro-batch, for each slot of the lease; a router sends one.
_MAX_UPDATES_PER_SLOT = 4


class Lease:
    """One router's blocks and slots on this shard, in one epoch."""

    def __init__(
        self,
        lease_id: int,
        epoch: int,
        *,
        first_block: int,
        num_blocks: int,
        block_size: int,
        max_slots: int,
        context_length: int,
        max_batch_tokens: int,
    ) -> None:
        if not 1 <= max_slots <= MAX_SLOTS:
            raise InvalidArgument(
                f"max_slots must be in [1, {MAX_SLOTS}]", field="max_slots", limit=MAX_SLOTS, value=max_slots
            )
        self.lease_id = lease_id
        self.epoch = epoch
        self.first_block = first_block
        self.num_blocks = num_blocks
        self._block_size = block_size
        self._context_length = context_length
        self._max_batch_tokens = max_batch_tokens
        self._next_step = 1
        # The lease's own block ids. A slot's table is as long as `_lengths` says; what is past that means nothing.
        # Zeros take no memory before they are written over, whatever number of slots was asked for. A table that is
        # longer than the lease has blocks would name one twice: so leases of one block cannot take much beside it.
        max_blocks = min(-(-context_length // block_size), num_blocks)
        self._tables = np.zeros((max_slots, max_blocks), dtype=np.int32)
        self._lengths = np.zeros(max_slots, dtype=np.int64)
        self._written = WrittenPositions(first_block, num_blocks, block_size, max_slots)

    def accept(self, header: pb.MicroBatchHeader) -> Batch:
        """Checks a micro-batch, applies its block-table updates, and lays out its rows.

        Raises StaleEpoch for another epoch or a gap in the steps, InvalidArgument and OutOfRange for rows, slots,
        blocks and positions that are not this lease's. Updates before the one at fault are then applied; no row is.
        """
        if header.epoch != self.epoch:
            raise StaleEpoch(
                f"epoch {header.epoch}: this lease is in epoch {self.epoch}",
                field="epoch",
                limit=self.epoch,
                value=header.epoch,
            )
        if header.step != self._next_step:
            raise StaleEpoch(
                f"step {header.step}: expected {self._next_step}",
                field="step",
                limit=self._next_step,
                value=header.step,
            )
        _check_below(
            "block_table_updates", len(header.block_table_updates), _MAX_UPDATES_PER_SLOT * len(self._lengths) + 1
        )
        for update in header.block_table_updates:
            self._apply(update.slot, update.first, update.block_ids)
        batch = self._batch(header)
        self._next_step += 1
        return batch

    def _apply(self, slot: int, first: int, block_ids: Sequence[int]) -> None:
        max_slots, max_blocks = self._tables.shape
        if slot >= max_slots:
            raise OutOfRange(
                f"slot {slot}: the lease has {max_slots}", field="block_table_updates.slot", limit=max_slots, value=slot
            )
        if first > self._lengths[slot] or first + len(block_ids) > max_blocks:
            raise OutOfRange(
                f"slot {slot}: entries {first}:{first + len(block_ids)}, its table has {self._lengths[slot]}",
                field="block_table_updates.first",
                limit=max_blocks,
                value=first + len(block_ids),
            )
        ids = np.fromiter(block_ids, dtype=np.int64, count=len(block_ids))
        if ids.size and ids.max() >= self.num_blocks:
            raise OutOfRange(
                f"block {ids.max()}: the lease has {self.num_blocks}",
                field="block_table_updates.block_ids",
                limit=self.num_blocks,
                value=ids.max(),
            )
        self._tables[slot, first : first + len(block_ids)] = ids
        self._lengths[slot] = first + len(block_ids)
        self._written.table_changed(slot, first)

    def _batch(self, header: pb.MicroBatchHeader) -> Batch:
        num_rows = len(header.row_slots)
        if not num_rows or len(header.row_starts) != num_rows or len(header.row_num_tokens) != num_rows:
            raise InvalidArgument(
                f"rows: {num_rows} slots, {len(header.row_starts)} starts, {len(header.row_num_tokens)} lengths",
                field="row_slots",
            )
        _check_below("row_slots", num_rows, len(self._lengths) + 1)  # no slot twice, so no more rows than slots
        slots = np.fromiter(header.row_slots, dtype=np.int64, count=num_rows)
        starts = np.fromiter(header.row_starts, dtype=np.int64, count=num_rows)
        num_tokens = np.fromiter(header.row_num_tokens, dtype=np.int64, count=num_rows)
        _check_below("row_slots", int(slots.max()), len(self._lengths))
        if len(set(header.row_slots)) != num_rows:
            raise InvalidArgument("row_slots: a slot is named twice", field="row_slots")
        if num_tokens.min() < 1:
            raise InvalidArgument("row_num_tokens: a row has no tokens", field="row_num_tokens", limit=1, value=0)
        _check_below("row_num_tokens", int(num_tokens.sum()), self._max_batch_tokens + 1)
        ends = starts + num_tokens
        _check_below("row_starts", int(ends.max()), self._context_length + 1)
        needed = -(-ends // self._block_size)
        short = needed > self._lengths[slots]
        if short.any():
            row = int(short.argmax())
            raise OutOfRange(
                f"slot {slots[row]}: {ends[row]} positions need {needed[row]} blocks, "
                f"its table has {self._lengths[slots[row]]}",
                field="row_starts",
                limit=self._lengths[slots[row]],
                value=needed[row],
            )
        batch = Batch.build(
            starts=starts,
            num_tokens=num_tokens,
            block_tables=self._tables[slots, : int(needed.max())] + np.int32(self.first_block),
            block_size=self._block_size,
        )
        gap = self._written.write(slots, batch)
        if gap is not None:
            row, position = gap
            raise OutOfRange(
                f"slot {slots[row]}: a row from position {starts[row]}, and {position} was never written",
                field="row_starts",
                limit=position,
                value=starts[row],
            )
        return batch


def _check_below(field: str, highest: int, limit: int) -> None:
    if highest >= limit:
        raise OutOfRange(f"{field}: {highest} is not below {limit}", field=field, limit=limit, value=highest)
