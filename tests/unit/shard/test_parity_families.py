"""Every family, cut into stages and chunks in every way, computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stagecoach_shard.models.families import open_checkpoint
from tests.unit.shard.stage_chain import Running, StageChain
from tests.unit.shard.tiny_models import MODELS, random_tokens, reference_logits, save_tiny_model

TOLERANCE = 1e-4
SPLITS = ([0, 4], [0, 1, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_for_every_split_whole_and_in_chunks(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS[name])
    # Past a tile of queries, so that tiles meet; and past the original context of the scaled rotations.
    token_ids = random_tokens(150, seed=1)
    expected = reference_logits(model, token_ids)
    assert expected.std() > 0.5, "the model says the same of every token: a comparison would prove nothing"
    checkpoint = open_checkpoint(tmp_path)
    for split in SPLITS:
        for chunk in (150, 41):
            chain = StageChain(checkpoint, split)
            running = Running(token_ids, blocks=list(range(50, 90)))
            while running.position < len(token_ids):
                chain.step((running, min(chunk, len(token_ids) - running.position)))
            difference = (running.stacked() - expected).abs().max().item()
            assert difference <= TOLERANCE, f"split {split}, chunks of {chunk}"


@pytest.mark.parametrize("name", MODELS)
def test_decoding_token_by_token_equals_transformers(name: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS[name])
    token_ids = random_tokens(30, seed=2)
    chain = StageChain(open_checkpoint(tmp_path), [0, 2, 4])
    running = Running(token_ids, blocks=[9, 3, 50, 4, 8, 1, 2, 60])
    chain.step((running, 6))
    while running.position < len(token_ids):
        chain.step((running, 1))
    torch.testing.assert_close(running.stacked(), reference_logits(model, token_ids), atol=TOLERANCE, rtol=0)


def test_a_dynamic_rotation_is_the_same_up_to_the_last_position_of_the_context(tmp_path: Path) -> None:
    settings = {**MODELS["llama-rope-dynamic"], "max_position_embeddings": 40}
    model = save_tiny_model(tmp_path, settings)
    token_ids = random_tokens(40, seed=3)
    running = Running(token_ids, blocks=list(range(10)))
    chain = StageChain(open_checkpoint(tmp_path), [0, 4])
    for count in (17, 22, 1):
        chain.step((running, count))
    torch.testing.assert_close(running.stacked(), reference_logits(model, token_ids), atol=TOLERANCE, rtol=0)


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, MODELS["qwen3"])
    token_ids = random_tokens(60, seed=4)
    expected = reference_logits(model, token_ids)
    theirs = reference_logits(model.to(torch.bfloat16), token_ids).float()
    chain = StageChain(open_checkpoint(tmp_path), [0, 2, 4], dtype=torch.bfloat16)
    running = Running(token_ids, blocks=list(range(15)))
    chain.step((running, 60))
    ours = (running.stacked().float() - expected).square().mean()
    assert ours <= 1.2 * (theirs - expected).square().mean()
