"""Puts load on a cluster through the public API, and says how fast it was.

All times are what the caller sees, in seconds. With s_i the moment request i was sent, f_i the one when its first
tokens came, and [a, b] the time from the first f_i to the last token of all:

- e2e tok/s: generated tokens / (b - the first s_i), so prefill is included.
- decode tok/s: tokens that came while no request was waiting for its first one, i.e. at moments of [a, b] in no
  (s_i, f_i], / the length of those moments. With one request per client that is everything after the last request's
  first tokens, which others call "generated tokens / wall time after prefill".
- TTFT: f_i - s_i. ITL: the time from one response to the next, divided evenly among the tokens the latter brought.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagecoach.errors import InternalError, InvalidArgument
from stagecoach_client.activity import Activity, activity
from stagecoach_client.async_client import AsyncClient

MAX_CONCURRENCY = 4096
MAX_REQUESTS_PER_CLIENT = 100_000
DEFINITIONS = {
    "e2e_tokens_per_s": "generated tokens / time from the first request sent to the last token; prefill included",
    "decode_tokens_per_s": "tokens that came while no request waited for its first token / that time",
    "ttft_s": "from sending a request to its first token",
    "itl_s": "between two responses of a request, divided among the tokens of the later one",
    "activity": "what the router and its stages did, from before the load to after it",
    "busy_fraction": "the part of wall time in which a stage's compute thread worked on a step",
    "bubble_fraction": "the part of the time with a running sequence (active_s) in which a stage computed nothing",
    "queue_s": "summed over a stage's steps: how long each had arrived before it was begun",
    "result_bytes_per_token": "what the last stage sent to the router, whole messages / generated tokens",
}


@dataclass(frozen=True, slots=True)
class Load:
    """`concurrency` clients that each send `requests_per_client` requests one after the other."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests_per_client: int = 1

    def __post_init__(self) -> None:
        _check("concurrency", self.concurrency, MAX_CONCURRENCY)
        _check("prompt_tokens", self.prompt_tokens, 2**20)
        _check("output_tokens", self.output_tokens, 2**20)
        _check("requests_per_client", self.requests_per_client, MAX_REQUESTS_PER_CLIENT)


@dataclass(slots=True)
class RequestTimes:
    """When one request was sent, and when how many of its tokens came."""

    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens), one for each response with any
    cached_tokens: int = 0

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def last_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a set of times, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How fast it was; the module says how each figure is defined."""

    concurrency: int
    num_requests: int
    prompt_tokens: int
    cached_tokens: int  # should be 0: else the prefix cache helped
    generated_tokens: int
    wall_s: float
    e2e_tokens_per_s: float
    decode_tokens_per_s: float | None  # None: there was always a request that waited for its first token
    ttft_s: Percentiles
    itl_s: Percentiles | None  # None: no request had a second response
    activity: Activity | None  # None: nobody looked


async def run_load(client: AsyncClient, load: Load, *, model: str, vocab_size: int, seed: int) -> LoadResult:
    """Runs `load` once. Prompts are random tokens, other ones for every request, so that no prefix is shared."""
    before = await client.status()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_one_client(client, load, model, vocab_size, random.Random(f"{seed}/{load}/{index}")))
                for index in range(load.concurrency)
            ]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others are its consequences, or the same again
    after = await client.status()
    requests = [request for task in tasks for request in task.result()]
    return summarize(load, requests, activity(after, before))


def summarize(load: Load, requests: Sequence[RequestTimes], done: Activity | None = None) -> LoadResult:
    """The figures of requests that have all ended."""
    wall_s = max(request.last_s for request in requests) - min(request.sent_s for request in requests)
    generated_tokens = sum(request.num_tokens for request in requests)
    gaps_s = token_gaps_s(requests)
    return LoadResult(
        concurrency=load.concurrency,
        num_requests=len(requests),
        prompt_tokens=len(requests) * load.prompt_tokens,
        cached_tokens=sum(request.cached_tokens for request in requests),
        generated_tokens=generated_tokens,
        wall_s=wall_s,
        e2e_tokens_per_s=generated_tokens / wall_s,
        decode_tokens_per_s=decode_tokens_per_s(requests),
        ttft_s=percentiles([request.first_s - request.sent_s for request in requests]),
        itl_s=percentiles(gaps_s) if gaps_s else None,
        activity=done,
    )


def decode_tokens_per_s(requests: Sequence[RequestTimes]) -> float | None:
    """Tokens per second while no request was waiting for its first one; None where there was no such time."""
    start_s = min(request.first_s for request in requests)
    end_s = max(request.last_s for request in requests)
    waiting = _union([(max(start_s, request.sent_s), request.first_s) for request in requests])
    decode_s = (end_s - start_s) - sum(end - start for start, end in waiting)
    if decode_s <= 0:
        return None
    num_tokens = 0
    for request in requests:
        for time_s, count in request.arrivals[1:]:
            if not any(start < time_s <= end for start, end in waiting):
                num_tokens += count
    return num_tokens / decode_s


def token_gaps_s(requests: Sequence[RequestTimes]) -> list[float]:
    """The inter-token latencies, one for each token but those of a request's first response."""
    gaps = []
    for request in requests:
        for (earlier_s, _), (later_s, count) in zip(request.arrivals, request.arrivals[1:], strict=False):
            gaps += [(later_s - earlier_s) / count] * count
    return gaps


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of `values` are at or below; between two of them, interpolated linearly."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def percentiles(values: Sequence[float]) -> Percentiles:
    """The usual three."""
    return Percentiles(percentile(values, 50), percentile(values, 90), percentile(values, 99))


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


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
