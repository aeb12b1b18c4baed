"""Decodes on a CUDA device as recorded graphs: one launch for all layers of the stage instead of some 25 a layer.

With few rows a GPU computes a layer faster than Python can launch its kernels. A graph is recorded for each pair of
(rows, blocks of the longest row), both rounded up to a few sizes, when that size is met for the second time; the first
time, and whatever is no such step (prefill, rows of very different lengths), goes through the layers as they are.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.attention.interface import AttentionShape
from stagecoach_shard.attention.static_decode import StaticDecodeStep, num_seen_blocks
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.decoder import TorchLayers

logger = logging.getLogger(__name__)

ROW_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BLOCK_SIZES = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# So many times what the rows see may be read for rounding up and for rows that are shorter than the longest; beyond it
# groups of rows of like lengths are better. Steps of a few blocks cost a launch, whatever they read.
MAX_PADDING = 4
MIN_BLOCKS = 16
# Of the keys and values that a layer of a recorded step gathers: the device keeps that much for all graphs together.
MAX_GATHERED_BYTES = 256 << 20


@dataclass(slots=True)
class _Recorded:
    """A graph, and the buffers that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph | None
    steps: dict[AttentionShape, StaticDecodeStep]
    inputs: Tensor  # [rows, hidden_size]
    outputs: Tensor | None  # [rows, hidden_size]


class GraphedLayers:
    """`layers`, with their decodes recorded; on a CPU the same steps run without a graph, which is what tests compare.

    Results are those of `layers` up to the order of sums, which differs with the number of blocks attended to.
    """

    def __init__(self, layers: TorchLayers, *, dtype: torch.dtype, device: torch.device) -> None:
        self._layers = layers
        self._dtype = dtype
        self._device = device
        self._met: set[tuple[int, int]] = set()
        self._too_large: set[tuple[int, int]] = set()  # for the memory that is left beside weights and K/V
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._cache: KVCache | None = None  # the one whose addresses the graphs have
        # One graph runs at a time, and what it leaves is used before the next one: they share what lies between.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.num_replays = 0

    @property
    def num_bytes(self) -> int:
        """What the weights take."""
        return self._layers.num_bytes

    def forward(self, hidden_states: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """`hidden_states` [num_tokens, hidden_size] -> the same."""
        size = self._size(batch)
        if size is None:
            return self._layers.forward(hidden_states, batch, cache)
        if cache is not self._cache:
            self._recorded.clear()
            self._cache = cache
        if size not in self._met or size in self._too_large:
            self._met.add(size)
            return self._layers.forward(hidden_states, batch, cache)
        recorded = self._recorded.get(size)
        if recorded is None:
            try:
                recorded = self._recorded[size] = self._record(size, hidden_states.shape[1], batch, cache)
            except torch.OutOfMemoryError as error:
                logger.warning("decodes of %d rows and %d blocks are not recorded: %s", *size, error)
                self._too_large.add(size)
                return self._layers.forward(hidden_states, batch, cache)
        return self._replay(recorded, hidden_states, batch, cache)

    def _size(self, batch: Batch) -> tuple[int, int] | None:
        """Rows and blocks of the graph that computes this step; None where none does."""
        num_rows = len(batch.starts)
        if batch.total_tokens != num_rows or num_rows > ROW_SIZES[-1]:
            return None
        seen = [num_seen_blocks(batch, shape.window) for shape in self._layers.attention_shapes]
        longest = max(int(blocks.max()) for blocks in seen)
        if longest > BLOCK_SIZES[-1]:
            return None
        rows, blocks = ROW_SIZES[bisect_left(ROW_SIZES, num_rows)], BLOCK_SIZES[bisect_left(BLOCK_SIZES, longest)]
        num_seen = max(int(blocks.sum()) for blocks in seen)
        num_allowed = min(max(MAX_PADDING * num_seen, MIN_BLOCKS), MAX_GATHERED_BYTES // self._block_bytes(batch))
        return (rows, blocks) if rows * blocks <= num_allowed else None

    def _block_bytes(self, batch: Batch) -> int:
        """What a block of keys and values takes in one layer."""
        numbers = max(shape.num_kv_heads * shape.head_dim for shape in self._layers.attention_shapes)
        return 2 * batch.block_size * numbers * self._dtype.itemsize

    def _record(self, size: tuple[int, int], hidden_size: int, batch: Batch, cache: KVCache) -> _Recorded:
        rows, blocks = size
        steps = {
            shape: StaticDecodeStep(shape, rows, blocks, batch.block_size, self._device)
            for shape in self._layers.attention_shapes
        }
        inputs = torch.zeros(rows, hidden_size, dtype=self._dtype, device=self._device)
        recorded = _Recorded(None, steps, inputs, None)
        if self._device.type == "cuda":
            for step in steps.values():
                step.fill(batch)  # what is recorded is not run, but block ids that are none would be refused
            recorded.graph = torch.cuda.CUDAGraph()
            # The event loop's threads may use the device meanwhile, and do not disturb this.
            with torch.cuda.graph(recorded.graph, pool=self._pool, capture_error_mode="thread_local"):
                recorded.outputs = self._run(recorded, cache)
        return recorded

    def _run(self, recorded: _Recorded, cache: KVCache) -> Tensor:
        for step in recorded.steps.values():
            step.prepare(self._dtype)
        positions = next(iter(recorded.steps.values())).positions
        return self._layers.run(recorded.inputs, positions, recorded.steps, cache)

    def _replay(self, recorded: _Recorded, hidden_states: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        num_rows = hidden_states.shape[0]
        recorded.inputs[:num_rows].copy_(hidden_states)
        recorded.inputs[num_rows:].copy_(hidden_states[:1])
        for step in recorded.steps.values():
            step.fill(batch)
        if batch.begun_blocks is not None:  # as SdpaStep.write says
            for layer_cache in cache.layers:
                layer_cache.index_fill_(0, batch.begun_blocks, 0.0)
        self.num_replays += 1
        if recorded.graph is None or recorded.outputs is None:
            return self._run(recorded, cache)[:num_rows]
        recorded.graph.replay()
        return recorded.outputs[:num_rows]
