"""Which positions of its blocks a lease has written itself.

A lease gets blocks that others had before it, with their K/V still in them. A row attends to every position before its
first one, so a row may only begin where all of those were written under this lease: by an earlier step, or by another
row of the same step, since a stage writes all rows' K/V of a layer before any row attends. This also catches a router
that counts on a prefix which nobody has computed, and would get wrong tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stagecoach_shard.attention.batch import Batch

IntArray = npt.NDArray[np.int64]


class WrittenPositions:
    """One byte for each position of the lease's blocks, which are `num_blocks` of the shard's from `first_block` on.

    For each slot it keeps up to where its table is known to be written, so that a decode need not look further back.
    """

    def __init__(self, first_block: int, num_blocks: int, block_size: int, max_slots: int) -> None:
        self._first_block = first_block
        self._block_size = block_size
        self._written = np.zeros((num_blocks, block_size), dtype=np.bool_)
        self._readable = np.zeros(max_slots, dtype=np.int64)

    def table_changed(self, slot: int, first: int) -> None:
        """The slot's table has been changed from entry `first` on."""
        self._readable[slot] = min(self._readable[slot], first * self._block_size)

    def write(self, slots: IntArray, batch: Batch) -> tuple[int, int] | None:
        """Enters a step's rows, all or none; `slots` [num_rows] are theirs.

        Returns None, or, where a row begins after a position that was never written, the row's index and that position.
        Then nothing is entered.
        """
        places = batch.cache_slots.numpy() - self._first_block * self._block_size
        written = self._written.reshape(-1)
        fresh = places[~written[places]]
        written[fresh] = True
        for row in np.flatnonzero(batch.starts > self._readable[slots]):
            slot, start = slots[row], int(batch.starts[row])
            readable = self._first_unwritten(batch.block_tables[row], int(self._readable[slot]), start)
            if readable < start:
                written[fresh] = False
                return int(row), readable
        self._readable[slots] = np.maximum(self._readable[slots], batch.ends)
        return None

    def _first_unwritten(self, table: npt.NDArray[np.int32], first: int, end: int) -> int:
        """The first position of [first, end) that was not written; `end` where all were."""
        first_block = first // self._block_size
        blocks = self._written[table[first_block : -(-end // self._block_size)] - self._first_block].reshape(-1)
        gaps = np.flatnonzero(~blocks[first - first_block * self._block_size : end - first_block * self._block_size])
        return first + int(gaps[0]) if len(gaps) else end
