"""How fast requests were answered: the figures of a load and how each is defined. Pure.

All times are in seconds, and as the caller sees them. Let s_i be the moment at which request i was sent, f_i the moment
at which its first tokens came, and [a, b] the time from the first f_i to the last token of all requests. Then:

- e2e tok/s: all generated tokens / (b - the first s_i). So prefill is included.
- decode tok/s: the tokens that came while no request was waiting for its first one / the length of that time, which is
  [a, b] without every (s_i, f_i]. With one request per client that is all that came after the last request's first
  tokens, which others call "generated tokens / wall time after prefill".
- TTFT: f_i - s_i.
- ITL: the time from one response to the next, divided evenly among the tokens that the latter brought.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagecoach_client.activity import Activity

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


@dataclass(slots=True)
class RequestTimes:
    """When a request was sent, and how many of its tokens came when."""

    sent_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (time, tokens) of each response that had tokens
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
    """Three percentiles of a set of times, in seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How fast the cluster was under one load. The module says how each figure is defined."""

    concurrency: int
    num_requests: int
    prompt_tokens: int
    cached_tokens: int  # 0, unless the prefix cache helped
    generated_tokens: int
    wall_s: float
    e2e_tokens_per_s: float
    decode_tokens_per_s: float | None  # None: there was always a request that waited for its first token
    ttft_s: Percentiles
    itl_s: Percentiles | None  # None: no request had a second response
    activity: Activity | None  # None: the router was not asked


def summarize(
    concurrency: int, prompt_tokens: int, requests: Sequence[RequestTimes], done: Activity | None = None
) -> LoadResult:
    """The figures of requests that have all ended."""
    wall_s = max(request.last_s for request in requests) - min(request.sent_s for request in requests)
    generated_tokens = sum(request.num_tokens for request in requests)
    gaps_s = token_gaps_s(requests)
    return LoadResult(
        concurrency=concurrency,
        num_requests=len(requests),
        prompt_tokens=len(requests) * prompt_tokens,
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
    """Tokens per second while no request was waiting for its first one. None if there was no such time."""
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
    """The inter-token latencies: one for each token, but for those of a request's first response."""
    gaps = []
    for request in requests:
        for (earlier_s, _), (later_s, count) in zip(request.arrivals, request.arrivals[1:], strict=False):
            gaps += [(later_s - earlier_s) / count] * count
    return gaps


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of `values` do not exceed, interpolated linearly between two of them."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def percentiles(values: Sequence[float]) -> Percentiles:
    """The percentiles 50, 90 and 99."""
    return Percentiles(percentile(values, 50), percentile(values, 90), percentile(values, 99))


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same moments as intervals that do not overlap, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
