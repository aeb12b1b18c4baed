"""A step's way to the stage's device and back. On the CPU there is none, and nothing here copies anything.

To and from a CUDA device everything goes through page-locked memory, the only kind that the device copies by itself.
It comes from torch's caching host allocator: a freed buffer is kept and handed out again, but not before the copies
that were begun on it have ended. So buffers are reused without our counting who still reads them: a result's buffer is
free once its frame has been written, a later step's input never lands in one that is still being copied.

Only the compute thread waits for the device, in `to_host`, once a step. The event loop gets host memory that is
complete, and never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def for_device(inputs: Tensor, device: torch.device) -> Tensor:
    """`inputs`, where a `to(device, non_blocking=True)` does not wait: still on the CPU, same shape and dtype."""
    if device.type != "cuda":
        return inputs
    return torch.empty_like(inputs, pin_memory=True).copy_(inputs)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on the CPU, complete when this returns. All of them are of one device, and waited for together."""
    if not tensors or tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors]
    host = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    ]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return host
