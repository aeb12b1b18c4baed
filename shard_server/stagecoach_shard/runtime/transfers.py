"""How a step gets to the stage's device and back. Where that is the CPU, nothing is copied.

To and from a CUDA device everything goes through page-locked memory, the only kind that the device copies by itself.
It comes from torch's caching host allocator, which keeps a freed buffer and hands it out again, but not before the
copies that were begun on it have ended. So nobody here has to count who still reads a buffer: a result's is free once
its frame has been written, and a later step's input never lands in one that is still being copied.

Only the compute thread waits for the device, in `to_host`, once a step. The event loop gets host memory that is
complete, and never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def for_device(inputs: Tensor, device: torch.device) -> Tensor:
    """`inputs`, still on the CPU, but in memory from which `to(device, non_blocking=True)` does not wait."""
    if device.type != "cuda":
        return inputs
    return torch.empty_like(inputs, pin_memory=True).copy_(inputs)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors`, all of one device, on the CPU. They are waited for together, and complete when this returns."""
    if not tensors or tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors]
    host = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    ]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return host
