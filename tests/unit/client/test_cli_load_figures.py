"""The figures of a load: percentiles, rates and gaps, from the times at which tokens came."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach_cli.load import Load
from stagecoach_cli.load_figures import RequestTimes, decode_tokens_per_s, percentile, summarize, token_gaps_s

floats = st.floats(-1e6, 1e6)


@given(st.lists(floats, min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


def test_percentiles_of_known_values() -> None:
    assert percentile([5.0], 99) == 5.0
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert [percentile(list(range(101)), p) for p in (0, 50, 90, 99, 100)] == [0, 50, 90, 99, 100]


def test_figures_of_two_requests_at_a_time() -> None:
    # Prefill until 2.0, when the second request gets its first token; 1 + 4 + 4 tokens after it, in 4 seconds.
    requests = [
        RequestTimes(0.0, [(1.0, 1), (2.0, 1), (4.0, 4), (6.0, 1)]),
        RequestTimes(0.0, [(2.0, 1), (4.0, 2), (6.0, 2)], cached_tokens=3),
    ]
    result = summarize(2, 10, requests)
    assert (result.num_requests, result.generated_tokens, result.prompt_tokens, result.cached_tokens) == (2, 12, 20, 3)
    assert result.wall_s == 6.0
    assert result.e2e_tokens_per_s == 2.0
    assert result.decode_tokens_per_s == (4 + 1 + 2 + 2) / 4
    assert result.ttft_s.p50 == 1.5
    assert sorted(token_gaps_s(requests)) == [0.5] * 4 + [1.0] * 5 + [2.0]


def test_decode_leaves_out_the_prefill_of_later_requests() -> None:
    requests = [
        RequestTimes(0.0, [(1.0, 1), (2.0, 10)]),
        RequestTimes(2.0, [(5.0, 1), (6.0, 20)]),  # the client's second request: 3 s until its first token
    ]
    assert decode_tokens_per_s(requests) == 30 / 2


def test_there_is_no_decode_rate_without_decoding() -> None:
    assert decode_tokens_per_s([RequestTimes(0.0, [(1.0, 5)])]) is None
    result = summarize(1, 1, [RequestTimes(0.0, [(1.0, 1)])])
    assert result.decode_tokens_per_s is None
    assert result.itl_s is None


steps = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8)  # (ticks, tokens)


@given(st.lists(steps, min_size=1, max_size=6))
def test_of_requests_sent_together_decode_is_what_follows_the_last_first_token(
    all_steps: list[list[tuple[int, int]]],
) -> None:
    requests = []
    for own in all_steps:
        times = [float(sum(ticks for ticks, _ in own[: index + 1])) for index in range(len(own))]
        requests.append(RequestTimes(0.0, [(time, count) for time, (_, count) in zip(times, own, strict=True)]))
    begin, end = max(r.first_s for r in requests), max(r.last_s for r in requests)
    tokens = sum(count for r in requests for time, count in r.arrivals if time > begin)
    assert decode_tokens_per_s(requests) == (tokens / (end - begin) if end > begin else None)
    assert len(token_gaps_s(requests)) == sum(r.num_tokens - r.arrivals[0][1] for r in requests)


@pytest.mark.parametrize("field", ["concurrency", "prompt_tokens", "output_tokens", "requests_per_client"])
def test_a_load_of_nothing_is_refused(field: str) -> None:
    arguments = {"concurrency": 1, "prompt_tokens": 1, "output_tokens": 1, field: 0}
    with pytest.raises(InvalidArgument) as caught:
        Load(**arguments)
    assert caught.value.field == field
