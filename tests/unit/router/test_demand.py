"""A request is wanted until the latest deadline of its calls, and for the linger time of those that broke."""

from __future__ import annotations

import math

from stagecoach_router.requests.demand import Demand


def test_nobody_wants_it_at_first() -> None:
    demand = Demand()
    assert not demand.is_read
    assert demand.until_s == -math.inf


def test_the_latest_deadline_of_all_calls_counts() -> None:
    demand = Demand()
    demand.begin_call(100.0)
    demand.begin_call(7.0)
    assert demand.until_s == 100.0
    demand.begin_call(math.inf)
    assert demand.until_s == math.inf
    demand.end_call(math.inf, 10.0)
    assert demand.until_s == 100.0


def test_a_call_whose_deadline_has_passed_is_not_waited_for() -> None:
    demand = Demand()
    demand.begin_call(7.0)
    demand.end_call(7.0, 67.0)
    assert not demand.is_read
    assert demand.until_s == 7.0


def test_a_call_that_broke_is_waited_for_although_another_that_asked_for_nothing_came_and_went() -> None:
    demand = Demand()
    demand.begin_call(3600.0)
    demand.begin_call(3600.0)
    demand.end_call(3600.0, 40.0)  # at 10 it broke, and lingers for 30
    demand.end_call(3600.0, 12.0)  # at 12 the other one left
    assert not demand.is_read
    assert demand.until_s == 40.0


def test_who_comes_back_is_the_one_that_was_waited_for() -> None:
    demand = Demand()
    demand.begin_call(3600.0)
    demand.end_call(3600.0, 40.0)
    demand.begin_call(3600.0)
    demand.end_call(3600.0, 20.0)  # it does not ask for any more this time
    assert demand.until_s == 20.0


def test_two_calls_of_one_deadline_are_two() -> None:
    demand = Demand()
    demand.begin_call(9.0)
    demand.begin_call(9.0)
    demand.end_call(9.0, 1.0)
    assert demand.is_read
    assert demand.until_s == 9.0
