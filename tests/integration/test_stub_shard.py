"""The benchmarks' stub shard keeps the contract: a real router generates with it, however tokens are chosen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import stub_shard
from stagecoach.errors import ConfigError
from stagecoach_client import AsyncClient
from tests.cluster import free_port, start_router, wait_until_ready

NUM_BLOCKS = 256


@pytest.fixture
async def client(tiny_model: Path) -> AsyncIterator[AsyncClient]:
    address, stop = f"127.0.0.1:{free_port()}", asyncio.Event()
    shard = asyncio.create_task(stub_shard.serve(tiny_model, address, NUM_BLOCKS, stop))
    front = start_router([address], lanes=2)
    async with AsyncClient(front.address, max_retries=0) as client:
        await wait_until_ready(client, front)
        yield client
    await front.close()
    stop.set()
    await shard


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 5, "n": 6},
        {"presence_penalty": 1.0, "logprobs": 2},
        {"presence_penalty": -1.0},
    ],
    ids=["greedy", "top-p", "top-k", "penalty and logprobs", "whole rows"],
)
async def test_a_router_generates_with_it(client: AsyncClient, sampling: dict[str, Any]) -> None:
    answers = await asyncio.gather(
        *(client.generate(token_ids=[1, 2, 3], max_tokens=40, ignore_eos=True, **sampling) for _ in range(6))
    )
    for answer in answers:
        assert all(len(completion.token_ids) == 40 for completion in answer.completions)
    status = await client.status()
    assert all(pipeline.ready and pipeline.epoch == 1 for pipeline in status.pipelines)


async def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model"):
        await stub_shard.serve(tmp_path, "127.0.0.1:0", NUM_BLOCKS, asyncio.Event())
