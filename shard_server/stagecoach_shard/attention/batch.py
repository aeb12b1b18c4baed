"""One micro-batch's rows, checked once and laid out as what the layers need.

Everything that decides a shape stays on the host in numpy, so that nothing in a step waits for a device to answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagecoach.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows lie one after the other: row i's tokens take positions starts[i] .. starts[i] + num_tokens[i] - 1."""

    starts: NDArray[np.int64]  # [num_rows]
    num_tokens: NDArray[np.int64]  # [num_rows], at least 1 each
    ends: NDArray[np.int64]  # [num_rows], starts + num_tokens
    first_tokens: NDArray[np.int64]  # [num_rows], where each row begins among the micro-batch's tokens
    block_tables: NDArray[np.int32]  # [num_rows, >= blocks needed]; entries past a row's need mean nothing
    block_size: int
    total_tokens: int
    max_block: int  # the largest block id that is used
    device: torch.device
    positions: Tensor  # int64 [total_tokens]
    cache_slots: Tensor  # int64 [total_tokens]: block id * block_size + offset, where each token's K/V goes
    begun_blocks: (
        Tensor | None
    )  # int64: blocks whose first position is written and whose last is not; None: there are none

    @classmethod
    def build(
        cls,
        *,
        starts: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        block_tables: NDArray[np.int32],
        block_size: int,
        device: torch.device,
    ) -> Batch:
        """`starts`, `num_tokens` int64 [num_rows]; `block_tables` int32 [num_rows, blocks], ids in this shard's cache.

        Raises InvalidArgument, with the field, for rows that do not fit together or into their block tables.
        """
        starts = np.asarray(starts, dtype=np.int64)
        num_tokens = np.asarray(num_tokens, dtype=np.int64)
        ends = starts + num_tokens
        _check(starts, num_tokens, ends, block_tables, block_size)
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
            max_block=_max_used(block_tables, last_blocks),
            device=device,
            positions=torch.from_numpy(positions).to(device),
            cache_slots=torch.from_numpy(blocks * block_size + positions % block_size).to(device),
            begun_blocks=torch.from_numpy(begun_blocks).to(device) if len(begun_blocks) else None,
        )

    @property
    def max_position(self) -> int:
        """The largest position of any token."""
        return int(self.ends.max()) - 1


def _check(
    starts: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    ends: NDArray[np.int64],
    block_tables: NDArray[np.int32],
    block_size: int,
) -> None:
    if starts.ndim != 1 or starts.shape != num_tokens.shape or len(starts) == 0:
        raise InvalidArgument(
            f"a micro-batch needs rows, each with a start and a token count; got {starts.shape} and {num_tokens.shape}",
            field="row_num_tokens",
        )
    if block_tables.ndim != 2 or len(block_tables) != len(starts):
        raise InvalidArgument(
            f"block tables must be [{len(starts)} rows, blocks]; got {list(block_tables.shape)}", field="block_tables"
        )
    if starts.min() < 0:
        raise InvalidArgument("a row starts before position 0", field="row_starts", limit=0, value=starts.min())
    if num_tokens.min() < 1:
        raise InvalidArgument("a row has no tokens", field="row_num_tokens", limit=1, value=num_tokens.min())
    room = block_tables.shape[1] * block_size
    if ends.max() > room:
        raise InvalidArgument(
            f"a row ends at position {ends.max()}; its block table reaches {room}",
            field="block_tables",
            limit=room,
            value=ends.max(),
        )


def _max_used(block_tables: NDArray[np.int32], last_blocks: NDArray[np.int64]) -> int:
    used = np.arange(block_tables.shape[1]) <= last_blocks[:, None]
    if (block_tables[used] < 0).any():
        raise InvalidArgument(
            "a row needs a block that its table does not have", field="block_tables", limit=0, value=-1
        )
    return int(block_tables[used].max())
