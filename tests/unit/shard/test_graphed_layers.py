"""Decodes in buffers that stay where they are compute what the same layers compute without them.

Here on the CPU, without a graph around them; tests/gpu has them recorded.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stagecoach_shard.models.graphed_layers import GraphedLayers
from tests.unit.shard.parity_schedules import SCHEDULES, SPLITS, Known
from tests.unit.shard.stage_chain import CPU, Running, StageChain
from tests.unit.shard.tiny_models import MODELS, random_tokens

NAMES = [name for name in MODELS if "window" in name or "slide" in name or name in ("llama-mha", "qwen3")]


def with_static_decodes(chain: StageChain) -> list[GraphedLayers]:
    """Has the chain's stages take the path of a CUDA device."""
    graphed = [GraphedLayers(stage._layers, dtype=stage.dtype, device=CPU) for stage in chain.stages]
    for stage, layers in zip(chain.stages, graphed, strict=True):
        stage._layers = layers
    return graphed


@pytest.fixture(scope="module", params=NAMES)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Known:
    return Known.make(request.param, tmp_path_factory.mktemp("model"))


def test_every_schedule_gives_the_logits_of_transformers(known: Known) -> None:
    num_replays = 0
    for schedule in SCHEDULES:
        chain = known.chain(SPLITS[1])
        graphed = with_static_decodes(chain)
        schedule(known, chain)
        num_replays += sum(layers.num_replays for layers in graphed)
    assert num_replays > 50, "hardly a step took the path that is tested"


def test_rows_of_unlike_lengths_and_numbers_that_fill_no_size(known: Known) -> None:
    chain, plain = known.chain([0, 4]), known.chain([0, 4])
    [graphed] = with_static_decodes(chain)
    both: list[list[Running]] = []
    for each in (chain, plain):
        running = [
            Running(random_tokens(60, seed=index), list(range(16 * index, 16 * index + 15))) for index in range(5)
        ]
        for index, one in enumerate(running):
            each.step((one, 3 + 9 * index))
        for _ in range(12):
            each.step(*((one, 1) for one in running))
            each.step(*((one, 1) for one in running[:3]))
        both.append(running)
    assert graphed.num_replays >= 20
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours.stacked(), theirs.stacked(), atol=1e-4, rtol=0)


def test_a_long_row_beside_short_ones_goes_in_groups_of_like_lengths(tmp_path: Path) -> None:
    known = Known.make("qwen3", tmp_path)
    chain = known.chain([0, 4])
    [graphed] = with_static_decodes(chain)
    running = [Running(random_tokens(200, seed=index), [index]) for index in range(20)]
    running.append(Running(random_tokens(200, seed=99), list(range(20, 70))))
    for one in running[:-1]:
        chain.step((one, 1))
    chain.step((running[-1], 190))
    before = graphed.num_replays
    for _ in range(3):
        chain.step(*((one, 1) for one in running))
    assert graphed.num_replays == before


def test_what_the_device_has_no_memory_to_record_is_computed_without(
    known: Known, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    chain = known.chain([0, 4])
    [graphed] = with_static_decodes(chain)
    monkeypatch.setattr(graphed, "_record", refuse)
    SCHEDULES[0](known, chain)
    assert graphed.num_replays == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) >= 1, "once for each size"
