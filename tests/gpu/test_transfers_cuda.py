"""To a CUDA device and back: the same values, through page-locked memory, however many steps follow one another."""

from __future__ import annotations

import pytest
import torch

from stagecoach_shard.runtime.transfers import for_device, to_host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float32])
def test_what_goes_there_comes_back(dtype: torch.dtype) -> None:
    sent = torch.arange(5000).view(50, 100).to(dtype)
    pinned = for_device(sent, CUDA)
    assert pinned.is_pinned()
    there = pinned.to(CUDA, non_blocking=True)
    (back,) = to_host([there])
    assert back.device.type == "cpu"
    assert back.is_pinned()
    assert torch.equal(back, sent)


def test_a_result_that_is_kept_is_not_overwritten_by_later_steps() -> None:
    kept = to_host([torch.full((1000,), 7.0, device=CUDA), torch.full((3,), 8.0, device=CUDA)])
    for step in range(50):
        inputs = for_device(torch.full((1000,), float(step)), CUDA).to(CUDA, non_blocking=True)
        (result,) = to_host([inputs * 2])
        assert bool((result == 2 * step).all())
    assert bool((kept[0] == 7.0).all())
    assert bool((kept[1] == 8.0).all())


def test_inputs_are_not_overwritten_while_they_are_being_copied() -> None:
    copies = [for_device(torch.full((1 << 20,), float(step)), CUDA).to(CUDA, non_blocking=True) for step in range(20)]
    assert (
        [float(copy.min()) for copy in copies] == [float(copy.max()) for copy in copies] == list(map(float, range(20)))
    )
