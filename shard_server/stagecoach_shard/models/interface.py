"""What a stage asks of its decoder layers, however they are computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.kv_cache import KVCache


class Layers(Protocol):
    """The decoder layers of a stage, computed one after the other."""

    @property
    def num_bytes(self) -> int:
        """How many bytes the weights take."""
        ...

    def forward(self, hidden_states: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """`hidden_states` [num_tokens, hidden_size] -> the same; `cache` has an entry for each of these layers.

        The dtype is the implementation's: it takes the stage's, and returns what the head is to have.
        """
        ...
