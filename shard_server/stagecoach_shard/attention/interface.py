"""What a layer asks of an attention implementation.

A micro-batch is prepared once for each kind of layer in the stage; each layer then writes its keys and values and
attends. A layer writes those of *all* rows before any row attends, so that a row may read blocks which another row of
the same micro-batch is only now filling (a prefix that two requests share).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stagecoach_shard.attention.batch import Batch


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """A kind of layer. Layers of one kind share what is prepared for a micro-batch."""

    num_heads: int
    num_kv_heads: int  # query head h reads key head h // (num_heads / num_kv_heads)
    head_dim: int
    window: int | None  # a token sees so many positions, itself among them; None: all before it


class AttentionStep(Protocol):
    """One micro-batch, prepared for one kind of layer. `cache` is the layer's own, of the shape the model gave it."""

    def write(self, cache: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores `keys` and `values` [num_tokens, num_kv_heads, head_dim] at the rows' positions."""
        ...

    def attend(self, cache: Tensor, queries: Tensor) -> Tensor:
        """`queries` [num_tokens, num_heads, head_dim] -> [num_tokens, num_heads * head_dim]."""
        ...


class Attention(Protocol):
    """A way to compute attention, on whichever device."""

    def prepare(self, batch: Batch, shape: AttentionShape, dtype: torch.dtype) -> AttentionStep:
        """Prepares `batch` for every layer of this shape. `dtype` is that of queries and cache."""
        ...
