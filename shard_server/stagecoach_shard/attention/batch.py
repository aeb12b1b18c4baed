"""One micro-batch's rows, laid out as the layers need them. A lease makes it of what it has checked; it is trusted.

Everything that decides a shape stays on the host in numpy, so that nothing in a step waits for a device to answer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows lie one after the other: row i's tokens take positions starts[i] .. starts[i] + num_tokens[i] - 1.

    Arrays are contiguous. Tensors are on the CPU until `to` moves them.
    """

    starts: NDArray[np.int64]  # [num_rows]
    num_tokens: NDArray[np.int64]  # [num_rows], at least 1 each
    ends: NDArray[np.int64]  # [num_rows], starts + num_tokens
    first_tokens: NDArray[np.int64]  # [num_rows], where each row begins among the micro-batch's tokens
    # [num_rows, >= blocks needed]: block ids in the shard's cache; entries past a row's need mean nothing.
    block_tables: NDArray[np.int32]
    block_size: int  # positions in a block
    total_tokens: int
    positions: Tensor  # int64 [total_tokens]
    cache_slots: Tensor  # int64 [total_tokens]: block id * block_size + offset, where each token's K/V goes
    # int64: the blocks whose first position is written and whose last is not; None: there are none.
    begun_blocks: Tensor | None

    @classmethod
    def build(
        cls,
        *,
        starts: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        block_tables: NDArray[np.int32],
        block_size: int,
    ) -> Batch:
        """`starts`, `num_tokens` int64 [num_rows]; `block_tables` int32 [num_rows, blocks], ids in this shard's cache.

        There is at least one row, each has at least one token, and its table at least the blocks for its positions.
        """
        assert block_tables.dtype == np.int32
        assert block_tables.flags.c_contiguous
        ends = starts + num_tokens
        total_tokens = int(num_tokens.sum())
        first_tokens = np.cumsum(num_tokens) - num_tokens
        row_of_token = np.repeat(np.arange(len(starts)), num_tokens)
        positions = np.arange(total_tokens) + (starts - first_tokens)[row_of_token]
        blocks = block_tables[row_of_token, positions // block_size].astype(np.int64)
        last_blocks = (ends - 1) // block_size
        begun = (last_blocks * block_size >= starts) & (ends % block_size != 0)
        begun_blocks = block_tables[np.flatnonzero(begun), last_blocks[begun]].astype(np.int64)
        return cls(
            starts=starts,
            num_tokens=num_tokens,
            ends=ends,
            first_tokens=first_tokens,
            block_tables=block_tables,
            block_size=block_size,
            total_tokens=total_tokens,
            positions=torch.from_numpy(positions),
            cache_slots=torch.from_numpy(blocks * block_size + positions % block_size),
            begun_blocks=torch.from_numpy(begun_blocks) if len(begun_blocks) else None,
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.positions.device

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on `device`; this one where they are there already."""
        if device == self.device:
            return self
        return dataclasses.replace(
            self,
            positions=self.positions.to(device),
            cache_slots=self.cache_slots.to(device),
            begun_blocks=None if self.begun_blocks is None else self.begun_blocks.to(device),
        )
