"""In the CPU kernels what is not a number, left by others in memory or in a row of its own, reaches nobody else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stagecoach.topology import LayerRange
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.stage import Stage
from tests.unit.shard.native_layers import (
    BUILDS,
    CPU,
    FAMILIES,
    compiler,
    family,
    make_batch,
    native,
    random_hidden,
)
from tests.unit.shard.tiny_models import random_tokens, save_tiny_model

NUM_BLOCKS = 60
# (start, number of tokens, blocks): decodes and chunks that end within a block, at its end and past a key block.
ROWS = [(0, 1, [50]), (20, 1, [51, 52]), (31, 1, [53, 54]), (0, 37, [40, 41, 42]), (250, 20, list(range(18, 35)))]


def past() -> torch.Tensor:
    """Whether a place in the cache is before its row's start, bool [NUM_BLOCKS, 16]."""
    places = torch.zeros(NUM_BLOCKS, 16, dtype=torch.bool)
    for start, _, blocks in ROWS:
        for position in range(start):
            places[blocks[position // 16], position % 16] = True
    return places


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_others_left_in_blocks_does_not_show(name: str, build: str) -> None:
    computed = native(family(name), build, num_blocks=NUM_BLOCKS)
    hidden = [random_hidden(count, family(name), count + start) for start, count, _ in ROWS]
    foreign = ~past()
    batches = [(make_batch(ROWS), torch.cat(hidden))]
    batches += [(make_batch([row]), states) for row, states in zip(ROWS, hidden, strict=True)]
    for batch, states in batches:
        outputs = []
        for value in (0.0, math.nan, math.inf, 3e38):
            computed.fill(0)
            for layer in computed.cache.layers:
                layer[foreign] = value
            outputs.append(computed.forward(states, batch))
        assert outputs[0].isfinite().all()
        for output in outputs[1:]:
            assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("build", BUILDS)
def test_what_lies_before_a_window_does_not_show(build: str) -> None:
    """Blocks that have slid out of it may be given to others one day."""
    computed = native(family("mistral-short-window"), build, num_blocks=NUM_BLOCKS)
    for start, count in ((40, 1), (40, 20), (300, 5), (257, 1)):  # of 7 positions: from 34, 294 and 251 on
        batch = make_batch([(start, count, list(range(20)))])
        hidden = random_hidden(count, family("mistral-short-window"), 0)
        outputs = []
        for value in (0.0, math.nan):
            computed.fill(0)
            for layer in computed.cache.layers:
                layer.flatten(0, 1)[: start - 6] = value
            outputs.append(computed.forward(hidden, batch))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rows_own_stays_its_own_and_never_becomes_a_number(name: str, build: str, bad: float) -> None:
    computed = native(family(name), build, num_blocks=NUM_BLOCKS)
    batch = make_batch(ROWS)
    hidden = random_hidden(batch.total_tokens, family(name), 1)
    computed.fill(0)
    expected = computed.forward(hidden, batch)
    rows = list(zip(batch.first_tokens.tolist(), batch.num_tokens.tolist(), strict=True))
    for first, count in rows:
        hidden = random_hidden(batch.total_tokens, family(name), 1)
        token = first + count // 2
        hidden[token, 3] = bad
        computed.fill(0)
        output = computed.forward(hidden, batch)
        assert not output[token].isfinite().any()
        others = torch.ones(batch.total_tokens, dtype=torch.bool)
        others[first : first + count] = False
        assert torch.equal(output[others], expected[others])


@pytest.mark.parametrize("build", BUILDS)
def test_keys_that_are_not_numbers_never_vanish_in_the_softmax(build: str) -> None:
    """Wherever in a register, a tile or a key block the only such key is: the search for the largest skips over it."""
    config = family("llama-3-to-1")
    computed = native(config, build, num_blocks=NUM_BLOCKS)
    for start, count in ((290, 1), (290, 3)):
        batch = make_batch([(start, count, list(range(20)))])
        hidden = random_hidden(count, config, 0)
        for place in (0, 1, 15, 16, 31, 32, 100, 255, 256, 257, 289):
            computed.fill(0)
            for layer in computed.cache.layers:
                layer.flatten(0, 1)[place, 0] = math.nan  # keys, of every head
            assert computed.forward(hidden, batch).isnan().all(), f"{count} tokens, key {place}"


@pytest.mark.parametrize("build", BUILDS)
def test_scores_far_apart_and_very_large_still_give_a_distribution(build: str) -> None:
    """A key that outweighs all others by e^1000 and more is all there is, not an overflow."""
    config = family("llama-3-to-1")
    computed = native(config, build, num_blocks=NUM_BLOCKS)
    for count in (1, 3):
        batch = make_batch([(290, count, list(range(20)))])
        computed.fill(0)
        for layer in computed.cache.layers:
            layer[:, :, 0] *= 1e4
            layer[:, :, 0, :, :][18:] = 0
        assert computed.forward(random_hidden(count, config, 0), batch).isfinite().all()


@pytest.fixture
def stage_of(tmp_path: Path) -> Callable[[], Stage]:
    def load() -> Stage:
        compiler()
        save_tiny_model(tmp_path, {"model_type": "llama", "head_dim": 64})
        return Stage.load(open_checkpoint(tmp_path), LayerRange(0, 4), dtype=torch.bfloat16, device=CPU)

    return load


def test_a_row_without_numbers_has_logits_without_numbers(stage_of: Callable[[], Stage]) -> None:
    stage = stage_of()
    assert stage.is_native
    cache = KVCache.allocate(stage.config, stage.layers, num_blocks=4, block_size=16, dtype=torch.bfloat16, device=CPU)
    cache.layers[0][1, :5] = math.nan  # the second row's past
    batch: Batch = make_batch([(0, 9, [0]), (5, 1, [1]), (0, 1, [2])])
    logits = stage.logits(stage.forward(torch.tensor(random_tokens(11, seed=0)), batch, cache))
    assert logits[9].isnan().all()
    assert logits[[*range(9), 10]].isfinite().all()
