"""On a CUDA device, as one stage and as two that share it, models compute what transformers computes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.models.graphed_layers import GraphedLayers
from tests.unit.shard.parity_schedules import SCHEDULES, TOLERANCE, Known
from tests.unit.shard.stage_chain import Running, StageChain
from tests.unit.shard.tiny_models import MODELS, random_tokens, reference_logits, save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]

CUDA = torch.device("cuda:0")
SPLITS = ([0, 4], [0, 1, 4])
# The device sums in another order than the CPU does. On an H100 logits of up to 38 are 1.2e-4 away from float64's, and
# transformers' own on the CPU 0.8e-4, so that the two may differ by more than either is wrong.
RELATIVE_TOLERANCE = 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_every_model_goes_through_every_schedule(name: str, tmp_path: Path) -> None:
    known = Known.make(name, tmp_path)
    for split in SPLITS:
        for schedule in SCHEDULES:
            schedule(known, known.chain(split, CUDA))


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_more_than_a_tile_whole_and_in_chunks(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS[name])
    token_ids = random_tokens(150, seed=1)
    expected = reference_logits(model, token_ids)
    checkpoint = open_checkpoint(tmp_path)
    for split in SPLITS:
        for chunk in (150, 41):
            chain = StageChain(checkpoint, split, device=CUDA)
            running = Running(token_ids, blocks=list(range(50, 90)))
            while running.position < len(token_ids):
                chain.step((running, min(chunk, len(token_ids) - running.position)))
            torch.testing.assert_close(running.stacked(), expected, atol=TOLERANCE, rtol=RELATIVE_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_about_as_close_to_float32_as_transformers_does(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path, MODELS["qwen3"])
    token_ids = random_tokens(60, seed=4)
    expected = reference_logits(model, token_ids)
    theirs = reference_logits(model.to(dtype), token_ids).float()
    chain = StageChain(open_checkpoint(tmp_path), [0, 2, 4], dtype=dtype, device=CUDA)
    running = Running(token_ids, blocks=list(range(15)))
    chain.step((running, 57))
    while running.position < 60:
        chain.step((running, 1))
    ours = (running.stacked().float() - expected).square().mean()
    assert ours <= 1.5 * (theirs - expected).square().mean()


def test_decodes_run_in_a_kernel_that_serves_every_length(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, MODELS["qwen3"])
    chain = StageChain(open_checkpoint(tmp_path), [0, 4], dtype=torch.bfloat16, device=CUDA)
    running = Running(random_tokens(12, seed=4), blocks=list(range(15)))
    chain.step((running, 10))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        chain.step((running, 1))
    names = [event.key for event in profile.key_averages() if "scaled_dot_product" in event.key]
    assert any("flash" in name or "efficient" in name for name in names), names
    assert not any("cudnn" in name for name in names), names


@pytest.mark.parametrize("name", ["qwen3", "mistral-window"])
def test_decodes_are_recorded_once_for_a_size_and_replayed(name: str, tmp_path: Path) -> None:
    known = Known.make(name, tmp_path)
    for split in SPLITS:
        chain = known.chain(split, CUDA)
        num_replays, num_recorded = 0, 0
        for schedule in SCHEDULES:
            schedule(known, chain)
            chain.poison(range(96))
        for stage in chain.stages:
            assert isinstance(stage._layers, GraphedLayers)
            num_replays += stage._layers.num_replays
            num_recorded += len(stage._layers._recorded)
        assert num_replays > 2 * num_recorded > 0


def test_recorded_decodes_of_many_rows_in_half_precision(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS["qwen3"])
    chain = StageChain(open_checkpoint(tmp_path), [0, 4], num_blocks=33 * 10, dtype=torch.bfloat16, device=CUDA)
    running = [Running(random_tokens(30, seed=row), list(range(10 * row, 10 * row + 10))) for row in range(33)]
    for index, one in enumerate(running):
        chain.step((one, 1 + index % 9))
    while running[0].position < 21:
        chain.step(*((one, 1) for one in running))
    for one in running[::8]:
        exact = reference_logits(model, one.token_ids[: one.position])
        theirs = reference_logits(model.to(torch.bfloat16), one.token_ids[: one.position]).float()
        model.to(torch.float32)
        ours = (one.stacked().float() - exact).square().mean()
        assert ours <= 2.0 * (theirs - exact).square().mean()
