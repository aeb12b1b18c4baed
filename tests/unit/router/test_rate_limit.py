"""A bucket lets nobody in that would pass its rate, and what it says about waiting is true."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.tenants.rate_limit import TokenBucket

rates = st.integers(1, 10**9)
clocks = st.floats(0, 10**7)
# (seconds that pass, units taken if let in)
uses = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1000)), max_size=60)


def test_a_full_bucket_lets_a_minutes_worth_through_at_once_and_then_nobody():
    bucket = TokenBucket(3, 0.0)
    for _ in range(3):
        assert bucket.wait_s(0.0) == 0.0
        bucket.take(1, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(20, abs=0.01)
    assert bucket.wait_s(19.9) > 0
    assert bucket.wait_s(20.1) == 0.0


def test_what_is_owed_is_made_up_for_first():
    bucket = TokenBucket(60, 0.0)
    bucket.take(100, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(41, abs=0.01)  # 40 owed, and one to be there


@given(rates, clocks, uses)
def test_the_wait_that_is_told_is_enough_and_not_too_much(per_minute, start_s, steps):
    bucket, now_s = TokenBucket(per_minute, start_s), start_s
    for elapsed_s, amount in steps:
        now_s += elapsed_s
        wait_s = bucket.wait_s(now_s)
        if wait_s:
            assert bucket.wait_s(now_s + 0.9 * wait_s - 0.01) > 0 or wait_s < 0.2
            now_s += wait_s
            assert bucket.wait_s(now_s) == 0.0
        bucket.take(amount, now_s)


@given(rates, st.lists(st.floats(0, 100), max_size=200))
def test_no_time_sees_more_than_the_rate_and_a_bucketful(per_minute, gaps_s):
    bucket, now_s, taken = TokenBucket(per_minute, 0.0), 0.0, 0
    for gap_s in gaps_s:
        now_s += gap_s
        if bucket.wait_s(now_s) == 0.0:
            bucket.take(1, now_s)
            taken += 1
    assert taken <= per_minute * (1 + now_s / 60) + 1e-3


@given(rates, rates, st.integers(0, 10**6))
def test_another_rate_forgives_nothing_and_gives_nothing(before, after, amount):
    bucket = TokenBucket(before, 0.0)
    bucket.take(amount, 0.0)
    bucket.resize(after, 0.0)
    left = min(before - amount, after)
    assert (bucket.wait_s(0.0) == 0.0) == (left >= 1)
    if left < 1:
        assert bucket.wait_s(0.0) == pytest.approx((1 - left) * 60 / after, abs=0.01)


def test_a_clock_that_stands_still_fills_nothing():
    bucket = TokenBucket(1, 5.0)
    bucket.take(1, 5.0)
    assert bucket.wait_s(5.0) == bucket.wait_s(5.0) == pytest.approx(60, abs=0.01)
    assert bucket.wait_s(4.0) == pytest.approx(60, abs=0.01)
