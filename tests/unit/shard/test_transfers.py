"""On the CPU a step's tensors are where they have to be."""

from __future__ import annotations

import torch

from stagecoach_shard.runtime.transfers import for_device, to_host

CPU = torch.device("cpu")


def test_inputs_of_a_stage_on_the_cpu_are_not_copied() -> None:
    inputs = torch.arange(6)
    assert for_device(inputs, CPU) is inputs


def test_results_on_the_cpu_are_not_copied() -> None:
    results = [torch.ones(2, 3), torch.arange(4)]
    assert all(one is other for one, other in zip(to_host(results), results, strict=True))
    assert to_host([]) == []
