"""Paged attention in plain torch, for any device: gather a row's blocks, then `scaled_dot_product_attention`.

The cache of a layer is [num_blocks, block_size, 2, num_kv_heads, head_dim], keys before values. A block is one piece
of several KB, which is what a gather from cold memory wants; what it yields is passed on as strided views.

Rows with one token (decodes) are attended to together, sorted by length and padded to the longest of their group; the
query heads that share a key head become the query length, which is many times faster on CPUs than `enable_gqa`. Rows
with more tokens (prefill) go one by one, in tiles of queries, each against no more keys than it can see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import AttentionShape

# Queries in one tile of a prefill row. Smaller wastes less on keys after the query, larger makes fewer calls.
_TILE = 128
# K/V gathered for one group of decodes. On a CPU what was gathered should still be in its cache when it is read.
_GROUP_BYTES = {"cpu": 1 << 20}
_DEFAULT_GROUP_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Decodes:
    """A group of rows of one token each, all padded to the same number of blocks."""

    tokens: Tensor | None  # int64 [rows], their places in the micro-batch; None: it is all of them, in order
    blocks: Tensor  # int64 [rows * num_blocks]
    num_rows: int
    keys: slice  # which of the gathered positions any row sees
    mask: Tensor | None  # [rows, 1, 1, keys], 0 or -inf; None: every row sees all of them


@dataclass(frozen=True, slots=True)
class _Tile:
    """A run of consecutive queries of one row, which are attended for together."""

    tokens: slice  # of the micro-batch's
    keys: slice  # of the row's gathered positions
    mask: Tensor  # [queries, keys], 0 or -inf


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A row of several tokens."""

    blocks: Tensor  # int64 [blocks]
    tiles: tuple[_Tile, ...]


class SdpaAttention:
    """Attention that runs on every device that torch has."""

    def __init__(self) -> None:
        # On a CUDA device torch would rather take cuDNN's kernel, which compiles a plan for every shape it has not met
        # before. A decode's keys are one more at every step, so that each step of an H100 took 60 ms instead of 7.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def prepare(self, batch: Batch, shape: AttentionShape, dtype: torch.dtype) -> SdpaStep:
        """Plans groups, tiles and masks. Masks are the only tensors made here that grow with the context."""
        single = batch.num_tokens == 1
        return SdpaStep(
            batch,
            shape,
            _plan_decodes(batch, np.flatnonzero(single), shape, dtype),
            _plan_prefills(batch, np.flatnonzero(~single), shape.window, dtype),
        )


class SdpaStep:
    """A micro-batch's plan, carried out layer by layer."""

    def __init__(self, batch: Batch, shape: AttentionShape, decodes: list[_Decodes], prefills: list[_Prefill]) -> None:
        self._batch = batch
        self._shape = shape
        self._decodes = decodes
        self._prefills = prefills

    def write(self, cache: Tensor, keys: Tensor, values: Tensor) -> None:
        """`keys`, `values` [num_tokens, num_kv_heads, head_dim] into `cache`."""
        # The rest of a block that is only begun is still its last owner's, and is read under a mask: were there a NaN
        # in it, one broken sequence would go on to break others.
        if self._batch.begun_blocks is not None:
            cache.index_fill_(0, self._batch.begun_blocks, 0.0)
        by_slot = cache.flatten(0, 1)  # [num_blocks * block_size, 2, num_kv_heads, head_dim], a view
        by_slot[:, 0].index_copy_(0, self._batch.cache_slots, keys)
        by_slot[:, 1].index_copy_(0, self._batch.cache_slots, values)

    def attend(self, cache: Tensor, queries: Tensor) -> Tensor:
        """`queries` [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim]."""
        if len(self._decodes) == 1 and self._decodes[0].tokens is None:
            return self._attend_decodes(self._decodes[0], cache, queries)
        attended = queries.new_empty(queries.shape[0], queries.shape[1] * queries.shape[2])
        for decodes in self._decodes:
            assert decodes.tokens is not None
            rows = queries.index_select(0, decodes.tokens)
            attended.index_copy_(0, decodes.tokens, self._attend_decodes(decodes, cache, rows))
        for prefill in self._prefills:
            gathered = cache.index_select(0, prefill.blocks).flatten(0, 1)  # [positions, 2, num_kv_heads, head_dim]
            for tile in prefill.tiles:
                attended[tile.tokens] = self._attend_tile(tile, gathered[tile.keys], queries[tile.tokens])
        return attended

    def _attend_decodes(self, decodes: _Decodes, cache: Tensor, queries: Tensor) -> Tensor:
        """`queries` [rows, num_heads, head_dim] -> [rows, num_heads * head_dim]."""
        num_rows, num_kv_heads, head_dim = decodes.num_rows, self._shape.num_kv_heads, self._shape.head_dim
        gathered = cache.index_select(0, decodes.blocks).view(num_rows, -1, 2, num_kv_heads, head_dim)
        keys, values = gathered[:, decodes.keys].permute(2, 0, 3, 1, 4)  # each [rows, num_kv_heads, keys, head_dim]
        grouped = queries.view(num_rows, num_kv_heads, -1, head_dim)  # the heads of a group as if they were positions
        attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=decodes.mask)
        return attended.reshape(num_rows, -1)

    def _attend_tile(self, tile: _Tile, gathered: Tensor, queries: Tensor) -> Tensor:
        """`queries` [n, num_heads, head_dim] -> [n, num_heads * head_dim].

        `gathered` [keys, 2, num_kv_heads, head_dim] is what they may see.
        """
        num_queries, num_kv_heads, head_dim = queries.shape[0], self._shape.num_kv_heads, self._shape.head_dim
        grouped = queries.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        shared = gathered.permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, grouped.shape[1], -1, -1)
        keys, values = shared  # each [num_kv_heads, num_heads / num_kv_heads, keys, head_dim], as are the queries
        attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=tile.mask)
        return attended.permute(2, 0, 1, 3).reshape(num_queries, -1)


def _first_visible(position: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    """The first position that a token at `position` sees."""
    return np.zeros_like(position) if window is None else np.maximum(position - window + 1, 0)


def _plan_decodes(batch: Batch, rows: NDArray[np.int64], shape: AttentionShape, dtype: torch.dtype) -> list[_Decodes]:
    positions = batch.starts[rows]
    first_blocks = _first_visible(positions, shape.window) // batch.block_size
    num_blocks = positions // batch.block_size - first_blocks + 1
    order = np.argsort(num_blocks, kind="stable")
    block_bytes = 2 * shape.num_kv_heads * batch.block_size * shape.head_dim * dtype.itemsize
    max_blocks = _GROUP_BYTES.get(batch.device.type, _DEFAULT_GROUP_BYTES) // block_bytes
    groups: list[list[int]] = []
    for index in order.tolist():
        # A group is as wide as its longest row, this one; the first in it is its shortest.
        width = int(num_blocks[index])
        if groups and (len(groups[-1]) + 1) * width <= max_blocks and width <= 2 * num_blocks[groups[-1][0]] + 2:
            groups[-1].append(index)
        else:
            groups.append([index])
    if len(groups) == 1 and len(rows) == len(batch.starts):
        groups = [list(range(len(rows)))]
    return [
        _plan_group(batch, rows[group], first_blocks[group], num_blocks[group], shape.window, dtype) for group in groups
    ]


def _plan_group(
    batch: Batch,
    rows: NDArray[np.int64],
    first_blocks: NDArray[np.int64],
    num_blocks: NDArray[np.int64],
    window: int | None,
    dtype: torch.dtype,
) -> _Decodes:
    # A row that is too short repeats its last block: those hold numbers of its own, which the mask then hides.
    steps = np.minimum(np.arange(num_blocks.max()), num_blocks[:, None] - 1)
    blocks = batch.block_tables[rows[:, None], first_blocks[:, None] + steps].astype(np.int64)
    positions, offsets = batch.starts[rows], first_blocks * batch.block_size
    first, last = _first_visible(positions, window) - offsets, positions - offsets  # among the gathered, inclusive
    keys = slice(int(first.min()), int(last.max()) + 1)
    mask = None
    if first.max() != keys.start or last.min() != keys.stop - 1:
        place = np.arange(keys.start, keys.stop)
        seen = (place >= first[:, None]) & (place <= last[:, None])
        mask = _mask(seen, dtype, batch.device)[:, None, None, :]
    everything = len(rows) == len(batch.starts)
    return _Decodes(
        tokens=None if everything else torch.from_numpy(batch.first_tokens[rows]).to(batch.device),
        blocks=torch.from_numpy(blocks.reshape(-1)).to(batch.device),
        num_rows=len(rows),
        keys=keys,
        mask=mask,
    )


def _plan_prefills(batch: Batch, rows: NDArray[np.int64], window: int | None, dtype: torch.dtype) -> list[_Prefill]:
    if len(rows) == 0:
        return []
    longest = int(batch.ends[rows].max())
    if window is not None:
        longest = min(longest, window + _TILE)
    # Seen from their ends, the queries and keys of every tile lie alike, so that one mask serves all: its lower right.
    from_end_q, from_end_k = np.arange(_TILE)[::-1, None], np.arange(longest)[::-1]
    seen = from_end_k >= from_end_q
    if window is not None:
        seen &= from_end_k < from_end_q + window
    mask = _mask(seen, dtype, batch.device)
    return [_plan_prefill(batch, int(row), window, mask) for row in rows]


def _plan_prefill(batch: Batch, row: int, window: int | None, mask: Tensor) -> _Prefill:
    start, end = int(batch.starts[row]), int(batch.ends[row])
    first_block = 0 if window is None else max(start - window + 1, 0) // batch.block_size
    blocks = batch.block_tables[row, first_block : (end - 1) // batch.block_size + 1].astype(np.int64)
    offset = first_block * batch.block_size
    place = int(batch.first_tokens[row]) - start  # from a position to its token's place in the micro-batch
    tiles = []
    for low in range(start, end, _TILE):
        high = min(low + _TILE, end)
        first_key = 0 if window is None else max(low - window + 1, 0)
        tile_mask = mask[mask.shape[0] - (high - low) :, mask.shape[1] - (high - first_key) :]
        # The kernels of other devices want rows of a mask to begin at aligned addresses.
        tile_mask = tile_mask if batch.device.type == "cpu" else tile_mask.clone()
        tiles.append(_Tile(slice(place + low, place + high), slice(first_key - offset, high - offset), tile_mask))
    return _Prefill(torch.from_numpy(blocks).to(batch.device), tuple(tiles))


def _mask(seen: NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores: 0 where `seen`, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(
        torch.from_numpy(~seen).to(device), float("-inf")
    )
