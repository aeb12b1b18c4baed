"""A lease as the contract says it, in the plainest Python: what it accepts, and what rows come of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from stagecoach.errors import StagecoachError
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.leases.lease import Lease

EPOCH = 5
FIRST_BLOCK = 100
NUM_BLOCKS = 8
BLOCK_SIZE = 4
MAX_SLOTS = 3
CONTEXT_LENGTH = 22
MAX_BATCH_TOKENS = 16
MAX_UPDATES = 4 * MAX_SLOTS
_MAX_BLOCKS = min(-(-CONTEXT_LENGTH // BLOCK_SIZE), NUM_BLOCKS)

# What one position of a row must be found under: (block in the shard's cache, offset in it).
Place = tuple[int, int]


def make_lease() -> Lease:
    """The real one, with the sizes that the model has."""
    return Lease(
        7,
        EPOCH,
        first_block=FIRST_BLOCK,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_slots=MAX_SLOTS,
        context_length=CONTEXT_LENGTH,
        max_batch_tokens=MAX_BATCH_TOKENS,
    )


@dataclass
class LeaseModel:
    """Every rule in its own line. `accept` gives the places of each row's positions, or None where it refuses."""

    step: int = 0
    tables: dict[int, list[int]] = field(default_factory=lambda: {slot: [] for slot in range(MAX_SLOTS)})
    written: set[tuple[int, int]] = field(default_factory=set)

    def accept(self, header: pb.MicroBatchHeader) -> list[list[Place]] | None:
        if header.epoch != EPOCH or header.step != self.step + 1 or len(header.block_table_updates) > MAX_UPDATES:
            return None
        if not all(self._apply(update) for update in header.block_table_updates):
            return None
        if not len(header.row_slots) == len(header.row_starts) == len(header.row_num_tokens) > 0:
            return None
        rows = list(zip(header.row_slots, header.row_starts, header.row_num_tokens, strict=True))
        if len({slot for slot, _, _ in rows}) != len(rows) or any(slot >= MAX_SLOTS for slot, _, _ in rows):
            return None
        if any(count < 1 for _, _, count in rows) or sum(count for _, _, count in rows) > MAX_BATCH_TOKENS:
            return None
        if any(start + count > min(CONTEXT_LENGTH, BLOCK_SIZE * len(self.tables[slot])) for slot, start, count in rows):
            return None
        new = {self._place(slot, position) for slot, start, count in rows for position in range(start, start + count)}
        known = self.written | new
        if any(self._place(slot, position) not in known for slot, start, _ in rows for position in range(start)):
            return None
        self.written = known
        self.step += 1
        return [
            [(FIRST_BLOCK + block, offset) for block, offset in (self._place(slot, p) for p in range(start + count))]
            for slot, start, count in rows
        ]

    def _apply(self, update: pb.BlockTableUpdate) -> bool:
        if update.slot >= MAX_SLOTS or update.first > len(self.tables[update.slot]):
            return False
        if update.first + len(update.block_ids) > _MAX_BLOCKS or any(block >= NUM_BLOCKS for block in update.block_ids):
            return False
        self.tables[update.slot] = self.tables[update.slot][: update.first] + list(update.block_ids)
        return True

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // BLOCK_SIZE], position % BLOCK_SIZE


class LeaseBesideModel:
    """A real lease and the model of it, which are given the same headers and must agree on each."""

    def __init__(self) -> None:
        self.lease, self.model = make_lease(), LeaseModel()

    @property
    def next_step(self) -> int:
        return self.model.step + 1

    def take(self, header: pb.MicroBatchHeader) -> bool:
        """Whether both accepted it; AssertionError where they differ, or where a row is not what the model says."""
        expected = self.model.accept(header)
        refusal = None
        try:
            rows = self.lease.accept(header)
        except StagecoachError as error:
            refusal = error
        assert (refusal is None) == (expected is not None), f"the lease: {refusal}, the model: {expected}\n{header}"
        if expected is None:
            return False
        assert rows.starts.tolist() == list(header.row_starts)
        assert rows.num_tokens.tolist() == list(header.row_num_tokens)
        blocks = range(FIRST_BLOCK, FIRST_BLOCK + NUM_BLOCKS)
        assert all(block in blocks for block in rows.block_tables.reshape(-1).tolist()), rows.block_tables
        for table, places in zip(rows.block_tables.tolist(), expected, strict=True):
            assert [(table[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(len(places))] == places, header
        return True
