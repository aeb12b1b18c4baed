"""What a stage computes of a micro-batch, at the ends of what it may be given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.stage import Stage
from tests.unit.shard.stage_chain import CPU
from tests.unit.shard.tiny_models import MODELS, VOCAB_SIZE, save_tiny_model

NUM_BLOCKS, BLOCK_SIZE, CONTEXT_LENGTH, HIDDEN_SIZE = 200, 4, 512, 48


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("llama")
    save_tiny_model(folder, MODELS["llama"])
    return open_checkpoint(folder)


def _stage(checkpoint: Checkpoint, layers: LayerRange) -> tuple[Stage, KVCache]:
    stage = Stage.load(checkpoint, layers, dtype=torch.float32, device=CPU)
    cache = KVCache.allocate(
        checkpoint.config, layers, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU
    )
    return stage, cache


def _batch(start: int, num_tokens: int, first_block: int = 0) -> Batch:
    return Batch.build(
        starts=np.array([start]),
        num_tokens=np.array([num_tokens]),
        block_tables=np.arange(first_block, first_block + 140, dtype=np.int32)[None],
        block_size=BLOCK_SIZE,
    )


def test_the_last_position_of_the_context_and_the_last_block_of_the_cache_are_served(checkpoint: Checkpoint) -> None:
    stage, cache = _stage(checkpoint, LayerRange(0, 1))
    stage.forward(torch.zeros(1, dtype=torch.int64), _batch(CONTEXT_LENGTH - 1, 1), cache)
    stage.forward(torch.zeros(1, dtype=torch.int64), _batch(0, 1, NUM_BLOCKS - 1), cache)


def test_hidden_states_that_it_is_given_are_left_as_they_are(checkpoint: Checkpoint) -> None:
    stage, cache = _stage(checkpoint, LayerRange(1, 4))
    given = torch.randn(3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
    kept = given.clone()
    stage.forward(given, _batch(0, 3), cache)
    assert torch.equal(given, kept)


def test_logits_of_no_rows_are_no_rows(checkpoint: Checkpoint) -> None:
    stage, _ = _stage(checkpoint, LayerRange(3, 4))
    assert stage.logits(torch.zeros(0, HIDDEN_SIZE)).shape == (0, VOCAB_SIZE)
