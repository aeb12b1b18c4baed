"""The K/V memory of a shard: one allocation, cut into a paged tensor for each of its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagecoach.topology import LayerRange
from stagecoach_shard.checkpoints.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """The caches of all layers of a stage, each of the shape that the model gives its layer (`cache_shape`)."""

    layers: tuple[Tensor, ...]  # one for each layer of the range, in order; views of one allocation
    num_blocks: int
    block_size: int  # positions in a block
    total_bytes: int

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        layers: LayerRange,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Takes all the memory at once: serving never allocates K/V. A CPU's pages become resident as they are used."""
        shapes = [
            config.cache_shape(layer, num_blocks=num_blocks, block_size=block_size)
            for layer in range(layers.start, layers.end)
        ]
        # Zeros: what was never written is read under a mask, where zero weight times a stray NaN would still be NaN.
        memory = _zeros(sum(math.prod(shape) for shape in shapes), dtype, device)
        pieces = torch.split(memory, [math.prod(shape) for shape in shapes])
        return cls(
            layers=tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)),
            num_blocks=num_blocks,
            block_size=block_size,
            total_bytes=memory.nbytes,
        )

    @staticmethod
    def bytes_per_block(config: ModelConfig, layers: LayerRange, *, block_size: int, dtype: torch.dtype) -> int:
        """How many bytes one block takes in all of `layers` together."""
        return dtype.itemsize * sum(
            math.prod(config.cache_shape(layer, num_blocks=1, block_size=block_size))
            for layer in range(layers.start, layers.end)
        )


def _zeros(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(num_elements, dtype=dtype, device=device)
    # numpy leaves the zeroing to the kernel, page by page; torch would write gigabytes before the shard is ready.
    return torch.from_numpy(np.zeros(num_elements * dtype.itemsize, dtype=np.uint8)).view(dtype)
