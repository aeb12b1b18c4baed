"""Stages one after the other in one process: a pipeline without its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.runtime.stage import Stage

CPU = torch.device("cpu")


@dataclass
class Running:
    """A sequence's tokens, the blocks it was given, and how far it was computed."""

    token_ids: list[int]
    blocks: list[int]
    position: int = 0
    logits: list[Tensor] = field(default_factory=list)  # one [vocab_size] for each computed position

    def stacked(self) -> Tensor:
        return torch.stack(self.logits)


class StageChain:
    """`boundaries` [0, a, b, num_layers] makes stages 0:a, a:b and b:num_layers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        boundaries: Sequence[int],
        *,
        num_blocks: int = 96,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        ranges = [LayerRange(*pair) for pair in pairwise(boundaries)]
        self.block_size = block_size
        self.stages = [Stage.load(checkpoint, layers, dtype=dtype, device=device) for layers in ranges]
        self.caches = [
            KVCache.allocate(
                checkpoint.config, layers, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
            )
            for layers in ranges
        ]
        self.poison(range(num_blocks))

    def poison(self, blocks: Sequence[int]) -> None:
        """Fills blocks with NaN: whatever is read from them without having been written shows."""
        for cache in self.caches:
            for layer in cache.layers:
                layer[list(blocks)] = float("nan")

    def step(self, *rows: tuple[Running, int]) -> None:
        """One micro-batch: the next so many tokens of each sequence. Their logits are added to the sequences."""
        widest = max(len(sequence.blocks) for sequence, _ in rows)
        tables = np.full((len(rows), widest), -1, dtype=np.int32)
        token_ids: list[int] = []
        for index, (sequence, count) in enumerate(rows):
            tables[index, : len(sequence.blocks)] = sequence.blocks
            token_ids += sequence.token_ids[sequence.position : sequence.position + count]
        batch = Batch.build(
            starts=np.array([sequence.position for sequence, _ in rows]),
            num_tokens=np.array([count for _, count in rows]),
            block_tables=tables,
            block_size=self.block_size,
        )
        hidden_states = torch.tensor(token_ids)
        for stage, cache in zip(self.stages, self.caches, strict=True):
            hidden_states = stage.forward(hidden_states, batch, cache)
        logits = self.stages[-1].logits(hidden_states).cpu()
        for (sequence, count), rows_logits in zip(rows, logits.split([count for _, count in rows]), strict=True):
            del sequence.logits[sequence.position :]
            sequence.logits += list(rows_logits)
            sequence.position += count
