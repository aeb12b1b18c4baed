"""A linear map in torch, computed in the way that is fastest on this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_PROBE_SIZE = 1024
_PROBE_TOKENS = (128, 256)
_PROBE_RUNS = 3
_NEVER = 1 << 62


class Linear:
    """x -> x @ weight.T + bias.

    A bfloat16 weight on a CPU is reordered for oneDNN once, as torch's own compiler does for inference: with few
    tokens that runs 1.2 to 2.4 times as fast as torch's linear, with many no slower. For float32 it is no gain.

    Many CPUs multiply bfloat16 at half the rate of float32 or less. From `wide_from` tokens on the weight is then
    widened on the fly and the product taken in float32, which is exact for the same inputs and rounded once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, wide_from: int | None = None) -> None:
        """`weight` [out_features, in_features], `bias` [out_features] of the same dtype. Keeps one copy.

        `wide_from` None: as measured once in a process.
        """
        self.out_features, self.in_features = weight.shape
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.packed = _can_pack(weight)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        self._bias = bias
        self._wide_bias = None if bias is None else bias.float()
        self._wide_from = _NEVER
        if self.packed:
            self._wide_from = measure_wide_from() if wide_from is None else wide_from

    def __call__(self, x: Tensor) -> Tensor:
        """[n, in_features] -> [n, out_features]."""
        if not self.packed:
            return functional.linear(x, self._weight, self._bias)
        if x.shape[0] >= self._wide_from:
            return _wide(x, self._weight, self._wide_bias)
        return _narrow(x, self._weight, self._bias)


@functools.cache
def measure_wide_from() -> int:
    """From how many tokens on widening pays on this CPU, with the threads torch has now; takes some 50 ms.

    Measured with a weight of 1,024 x 1,024, since what a CPU says it supports does not say how fast it is.
    """
    weight = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=torch.bfloat16)
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    for num_tokens in _PROBE_TOKENS:
        x = torch.ones(num_tokens, _PROBE_SIZE, dtype=torch.bfloat16)
        if _fastest(_wide, x, packed) < _fastest(_narrow, x, packed):
            return num_tokens
    return _NEVER


def _narrow(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _wide(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.float(), packed.to_dense(torch.float32), bias).to(x.dtype)


def _fastest(run: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, packed: Tensor) -> float:
    times = []
    with torch.inference_mode():
        for _ in range(_PROBE_RUNS):
            begin = time.perf_counter()
            run(x, packed, None)
            times.append(time.perf_counter() - begin)
    return min(times)


def _can_pack(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
