"""Who may take how much of a pool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import Overloaded
from stagecoach_router.tenants.fair_share import ALPHA, FairShare


def fill(pool: FairShare, caller: str) -> int:
    """Takes one after the other for a caller until it is refused; how many that were."""
    num = 0
    while pool.room_for(caller):
        pool.take(caller)
        num += 1
    return num


def test_a_lone_caller_gets_nearly_all_and_leaves_room_for_the_next() -> None:
    pool = FairShare("places", 900)
    assert fill(pool, "greedy") == 800
    with pytest.raises(Overloaded):
        pool.take("greedy")
    assert fill(pool, "late") >= 80
    assert pool.num_held < pool.size, "and there is some left for the one after that"


def test_a_small_pool_is_whoevers_comes() -> None:
    for size in range(1, ALPHA + 1):
        assert fill(FairShare("places", size), "alone") == size


@given(st.integers(1, 3000))
def test_the_most_that_one_may_have_is_what_a_lone_caller_gets(size: int) -> None:
    assert fill(pool := FairShare("places", size), "alone") == pool.most_for_one


def test_callers_who_take_turns_have_equal_parts() -> None:
    pool, callers = FairShare("places", 340), ["a", "b", "c"]
    while any(pool.room_for(caller) for caller in callers):
        for caller in callers:
            if pool.room_for(caller):
                pool.take(caller)
    parts = [pool.held_by(caller) for caller in callers]
    assert max(parts) - min(parts) <= 1
    assert sum(parts) >= 340 * 24 // 25 - 1


def test_what_is_given_back_can_be_taken_again() -> None:
    pool = FairShare("places", 8)
    pool.take("a", 8)
    assert not pool.room_for("b")
    pool.give_back("a", 5)
    pool.take("b", 5)
    pool.give_back("a", 3)
    pool.give_back("b", 5)
    assert (pool.num_held, pool._held, pool.room_for("a")) == (0, {}, 8), "nobody is remembered who holds nothing"


def test_a_refusal_says_what_the_caller_may_have_and_when_to_come_again() -> None:
    pool = FairShare("open calls", 90)
    pool.take("a", 75)
    with pytest.raises(Overloaded) as caught:
        pool.take("a", 6, retry_after_s=3.0)
    assert (caught.value.limit, caught.value.value, caught.value.retry_after_s) == ("80", "81", 3.0)
    assert pool.held_by("a") == 75, "nothing was taken"
    assert "75 of 90 open calls are taken, 75 of them by this caller, who may have 80 now" in str(caught.value)


def test_what_was_let_in_before_is_taken_whatever_the_share() -> None:
    pool = FairShare("sequences", 4)
    pool.force("a", 6)
    assert (pool.room_for("a"), pool.room_for("b")) == (0, 0)
    pool.give_back("a", 3)
    assert pool.room_for("b") == 1


@given(
    size=st.integers(1, 2000),
    others=st.lists(st.integers(0, 300), max_size=4),
    amount=st.integers(1, 2000),
)
def test_many_at_once_are_granted_exactly_where_one_by_one_would_be(size: int, others: list[int], amount: int) -> None:
    at_once, singly = FairShare("units", size), FairShare("units", size)
    for number, held in enumerate(others):
        for pool in (at_once, singly):
            pool.force(str(number), min(held, size - pool.num_held))
    room = at_once.room_for("0")
    assert fill(singly, "0") == room
    if amount <= room:
        at_once.take("0", amount)
    else:
        with pytest.raises(Overloaded):
            at_once.take("0", amount)


@given(st.lists(st.integers(0, 5), max_size=300))
def test_while_few_hold_everything_there_is_room_for_one_who_comes_new(callers: list[int]) -> None:
    pool = FairShare("units", 100)
    for caller in callers:
        if pool.room_for(str(caller)):
            pool.take(str(caller))
    assert pool.room_for("new") >= 1
