"""Puts load on a cluster through the public API. load_figures.py makes of it how fast the cluster was."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from stagecoach.errors import InternalError, InvalidArgument
from stagecoach_cli.load_figures import LoadResult, RequestTimes, summarize
from stagecoach_client.activity import activity
from stagecoach_client.async_client import AsyncClient

MAX_CONCURRENCY = 4096
MAX_REQUESTS_PER_CLIENT = 100_000


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` clients, each of which sends `requests_per_client` requests, one after another."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests_per_client: int = 1

    def __post_init__(self) -> None:
        _check("concurrency", self.concurrency, MAX_CONCURRENCY)
        _check("prompt_tokens", self.prompt_tokens, 2**20)
        _check("output_tokens", self.output_tokens, 2**20)
        _check("requests_per_client", self.requests_per_client, MAX_REQUESTS_PER_CLIENT)


async def run_load(client: AsyncClient, load: Load, *, model: str, vocab_size: int, seed: int) -> LoadResult:
    """Runs `load` once. Each prompt has random tokens of its own, so that no prefix is shared."""
    before = await client.status()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_one_client(client, load, model, vocab_size, random.Random(f"{seed}/{load}/{index}")))
                for index in range(load.concurrency)
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others follow from it, or say the same
    after = await client.status()
    requests = [request for task in tasks for request in task.result()]
    return summarize(load.concurrency, load.prompt_tokens, requests, activity(after, before))


async def _one_client(
    client: AsyncClient, load: Load, model: str, vocab_size: int, dice: random.Random
) -> list[RequestTimes]:
    requests = []
    for _ in range(load.requests_per_client):
        prompt = [dice.randrange(vocab_size) for _ in range(load.prompt_tokens)]
        request = RequestTimes(time.perf_counter())
        async with await client.generate(
            token_ids=prompt, model=model, max_tokens=load.output_tokens, temperature=0.0, ignore_eos=True, stream=True
        ) as stream:
            async for chunk in stream:
                if chunk.token_ids:
                    request.arrivals.append((time.perf_counter(), len(chunk.token_ids)))
                request.cached_tokens += chunk.usage.cached_tokens if chunk.usage is not None else 0
        if request.num_tokens != load.output_tokens:
            text = f"a request asked for {load.output_tokens} tokens and got {request.num_tokens}"
            raise InternalError(text, field="output_tokens", limit=load.output_tokens, value=request.num_tokens)
        requests.append(request)
    return requests


def _check(name: str, value: int, limit: int) -> None:
    if not 1 <= value <= limit:
        text = f"{name} must be a whole number in [1, {limit}]; got {value}"
        raise InvalidArgument(text, field=name, limit=f"[1, {limit}]", value=value)
