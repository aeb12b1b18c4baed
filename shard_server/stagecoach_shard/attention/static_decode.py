"""Attention for decodes whose shapes and addresses stay the same from step to step, as a CUDA graph wants them.

A graph replays kernels with the arguments that they were recorded with. So a step of `num_rows` decodes of at most
`num_blocks` blocks each gets buffers of its own: whatever differs between two steps of that size is a number in them.
Rows that a step does not fill repeat its first row, which writes the same keys to the same place once more.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import AttentionShape


def first_blocks(batch: Batch, window: int | None) -> NDArray[np.int64]:
    """Of decodes: the first block of each row that its token sees anything of; int64 [num_rows]."""
    if window is None:
        return np.zeros_like(batch.starts)
    seen: NDArray[np.int64] = np.maximum(batch.starts - window + 1, 0) // batch.block_size
    return seen


def num_seen_blocks(batch: Batch, window: int | None) -> NDArray[np.int64]:
    """Of decodes: over how many blocks each row's token looks; int64 [num_rows]."""
    return batch.starts // batch.block_size - first_blocks(batch, window) + 1


class StaticDecodeStep:
    """`num_rows` decodes of layers of one `shape`, each over `num_blocks` blocks of `block_size` positions."""

    def __init__(
        self, shape: AttentionShape, num_rows: int, num_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._shape = shape
        self._num_blocks = num_blocks
        # int64: for each row its position, the cache slot of its token, and the position at which its blocks begin;
        # then the block ids of all rows. In one buffer, so that filling it is one copy.
        self._numbers = torch.zeros(num_rows * (3 + num_blocks), dtype=torch.int64, device=device)
        self.positions, self._cache_slots, self._offsets = self._numbers[: 3 * num_rows].view(3, num_rows)
        self._blocks = self._numbers[3 * num_rows :]
        self._places = torch.arange(num_blocks * block_size, device=device)
        self._mask: Tensor | None = None

    def fill(self, batch: Batch) -> None:
        """Takes the numbers of a micro-batch of decodes, of at most so many rows and blocks."""
        num_rows = len(self.positions)
        first = first_blocks(batch, self._shape.window)
        last = batch.starts // batch.block_size
        # A row that is too short repeats its last block: those hold numbers of its own, which the mask then hides.
        wanted = np.minimum(first[:, None] + np.arange(self._num_blocks), last[:, None])
        blocks = np.take_along_axis(batch.block_tables, wanted, axis=1)
        own_blocks = np.take_along_axis(batch.block_tables, last[:, None], axis=1)[:, 0].astype(np.int64)
        slots = own_blocks * batch.block_size + batch.starts % batch.block_size
        rows = np.arange(num_rows)
        rows[len(first) :] = 0
        numbers = np.concatenate(
            (batch.starts[rows], slots[rows], first[rows] * batch.block_size, blocks[rows].reshape(-1)), dtype=np.int64
        )
        host = torch.from_numpy(numbers)
        self._numbers.copy_(host.pin_memory() if self._numbers.is_cuda else host, non_blocking=True)

    def prepare(self, dtype: torch.dtype) -> None:
        """Works out, on the device, the mask for what `fill` has brought. Part of what a graph records."""
        places = self._places + self._offsets[:, None]  # [rows, keys]: the position of each gathered key
        positions = self.positions[:, None]
        seen = places <= positions
        if self._shape.window is not None:
            seen = seen & (places > positions - self._shape.window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        self._mask = mask[:, None, None, :]

    def write(self, cache: Tensor, keys: Tensor, values: Tensor) -> None:
        """`keys`, `values` [num_rows, num_kv_heads, head_dim] into `cache`."""
        by_slot = cache.flatten(0, 1)  # [num_blocks * block_size, 2, num_kv_heads, head_dim], a view
        by_slot[:, 0].index_copy_(0, self._cache_slots, keys)
        by_slot[:, 1].index_copy_(0, self._cache_slots, values)

    def attend(self, cache: Tensor, queries: Tensor) -> Tensor:
        """`queries` [num_rows, num_heads, head_dim] -> [num_rows, num_heads * head_dim]."""
        num_rows, num_kv_heads, head_dim = queries.shape[0], self._shape.num_kv_heads, self._shape.head_dim
        gathered = cache.index_select(0, self._blocks).view(num_rows, -1, 2, num_kv_heads, head_dim)
        keys, values = gathered.permute(2, 0, 3, 1, 4)  # each [num_rows, num_kv_heads, keys, head_dim]
        grouped = queries.view(num_rows, num_kv_heads, -1, head_dim)  # the heads of a group as if they were positions
        attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return attended.reshape(num_rows, -1)
