"""Which deaths a process comes back from, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from stagecoach_local.process_exit import Ended
from stagecoach_local.restarts import (
    FIRST_DELAY_S,
    MAX_DELAY_S,
    MAX_FAILED_STARTS,
    MAX_KILLED_START_DELAY_S,
    MAX_KILLED_STARTS,
    MAX_KILLS_AT_ONCE,
    SETTLED_S,
    GiveUp,
    Restarts,
    StartAgain,
)

CRASH, KILL = 1, -9


def ended(status: int = CRASH, *lines: str) -> Ended:
    return Ended("shard 0:15", 7, status, lines)


def delays_s(restarts: Restarts, lives_s: Sequence[float], *, status: int = CRASH, came_up: bool = True) -> list[float]:
    decisions = [restarts.after(ended(status), lived_s=lived_s, came_up=came_up) for lived_s in lives_s]
    return [decision.delay_s for decision in decisions if isinstance(decision, StartAgain)]


def test_a_crash_is_answered_at_once_the_first_time_and_then_later_and_later() -> None:
    assert delays_s(Restarts(), [3.0] * 8) == [0.0, *(FIRST_DELAY_S * 2**power for power in range(5)), 10.0, 10.0]
    assert delays_s(Restarts(), [3.0] * 2000)[-1] == MAX_DELAY_S


@pytest.mark.parametrize("status", [-4, -6, -11, 1, 3])
def test_a_signal_that_is_a_crash_counts_as_one(status: int) -> None:
    assert delays_s(Restarts(), [3.0] * 3, status=status) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("status", [KILL, -15, -2, -1, 0])
def test_who_did_its_job_until_it_was_killed_is_started_again_at_once(status: int) -> None:
    assert delays_s(Restarts(), [3.0] * MAX_KILLS_AT_ONCE, status=status) == [0.0] * MAX_KILLS_AT_ONCE


def test_kills_without_end_are_slowed_down_as_a_machine_without_memory_makes_them() -> None:
    delays = delays_s(Restarts(), [3.0] * (MAX_KILLS_AT_ONCE + 8), status=KILL)
    assert delays[MAX_KILLS_AT_ONCE:] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_kill_says_nothing_about_crashes_and_excuses_none() -> None:
    restarts = Restarts()
    assert delays_s(restarts, [3.0] * 3) == [0.0, 0.5, 1.0]
    delays_s(restarts, [3.0], status=KILL)
    assert delays_s(restarts, [3.0]) == [2.0]


def test_who_lived_long_enough_is_started_again_at_once() -> None:
    assert delays_s(Restarts(), [1.0, 1.0, 1.0, SETTLED_S, 1.0]) == [0.0, 0.5, 1.0, 0.0, 0.5]
    kills = [3.0] * MAX_KILLS_AT_ONCE + [SETTLED_S] + [3.0] * (MAX_KILLS_AT_ONCE - 1)
    assert set(delays_s(Restarts(), kills, status=KILL)) == {0.0}


@pytest.mark.parametrize("status", [CRASH, KILL])
def test_a_process_that_came_up_is_started_again_however_often_it_ends(status: int) -> None:
    assert len(delays_s(Restarts(), [3.0] * 100, status=status)) == 100


@pytest.mark.parametrize(
    ("status", "limit", "expected_s"),
    [
        (CRASH, MAX_FAILED_STARTS, [0.0, 0.5, 1.0, 2.0]),
        (KILL, MAX_KILLED_STARTS, [0.0, 0.5, *[MAX_KILLED_START_DELAY_S] * 7]),
    ],
)
def test_one_that_never_comes_up_is_given_up_however_long_it_tried(
    status: int, limit: int, expected_s: list[float]
) -> None:
    restarts = Restarts()
    assert delays_s(restarts, [1000.0] * (limit - 1), status=status, came_up=False) == expected_s
    assert restarts.after(ended(status), lived_s=1000.0, came_up=False) == GiveUp(
        f"and did not come up {limit} times in a row"
    )


def test_one_that_cannot_be_started_is_tried_later_and_later_and_then_given_up() -> None:
    restarts = Restarts()
    decisions = [restarts.after_no_start() for _ in range(MAX_FAILED_STARTS)]
    assert decisions[:-1] == [StartAgain(delay_s) for delay_s in (0.5, 0.5, 1.0, 2.0)], "never at once: that failed"
    assert decisions[-1] == GiveUp(f"and did not come up {MAX_FAILED_STARTS} times in a row")


def test_coming_up_is_a_new_beginning_for_one_that_was_killed_while_it_started() -> None:
    restarts = Restarts()
    for _ in range(10):
        assert delays_s(restarts, [1.0] * 3, status=KILL, came_up=False) == [0.0, 0.5, 1.0]
        assert delays_s(restarts, [3.0], status=KILL) == [0.0]


def test_coming_up_once_is_a_new_beginning() -> None:
    restarts = Restarts()
    for _ in range(3):
        assert len(delays_s(restarts, [1.0] * (MAX_FAILED_STARTS - 1), came_up=False)) == MAX_FAILED_STARTS - 1
        delays_s(restarts, [1.0])


@pytest.mark.parametrize(
    ("end", "mistake"),
    [
        (ended(2, "usage: stagecoach-shard"), True),
        (ended(1, "loading", "stagecoach-shard: error: kv-cache-memory: too little"), True),
        (ended(1, "stagecoach-shard: error: listen: cannot listen on 127.0.0.1:7: is the port in use?"), False),
        (ended(1, "Traceback (most recent call last):", "KeyError: 'x'"), False),
        (ended(1), False),
        (ended(0, "stagecoach-shard: error: what it had said before"), False),
        (ended(-9, "stagecoach-shard: error: what it had said before"), False),
    ],
)
def test_a_mistake_in_the_settings_is_told_from_a_crash(end: Ended, mistake: bool) -> None:
    assert end.was_mistaken == mistake


def test_a_port_that_somebody_else_has_is_told_from_other_ends() -> None:
    error = "stagecoach-router: error: listen: cannot listen on 127.0.0.1:7: is the port in use?"
    assert ended(1, "loading", error).port_was_taken
    assert ended(1, "loading", error).died().ended == ended(1, "loading", error)
    assert not ended(1, "stagecoach-router: error: shards: missing").port_was_taken


REFUSED = ended(1, "stagecoach-shard: error: kv-cache-memory: too little")


def test_a_mistake_is_not_tried_again_unless_the_process_had_come_up() -> None:
    assert Restarts().after(REFUSED, lived_s=1.0, came_up=False) == GiveUp("which a new start does not mend")
    assert Restarts().after(REFUSED, lived_s=1.0, came_up=True) == StartAgain(0.0)


def test_what_is_short_for_a_while_costs_no_process_that_had_come_up() -> None:
    """The system kills it for want of memory, and there is too little for its start, too; or it cannot be started."""
    restarts = Restarts()
    restarts.after(ended(KILL), lived_s=1000.0, came_up=True)
    shortages = [
        *[restarts.after(REFUSED, lived_s=1.0, came_up=False) for _ in range(8)],
        *[restarts.after(ended(KILL), lived_s=1.0, came_up=False) for _ in range(2 * MAX_KILLED_STARTS)],
        *[restarts.after_no_start() for _ in range(2 * MAX_FAILED_STARTS)],
    ]
    delays = [shortage.delay_s for shortage in shortages if isinstance(shortage, StartAgain)]
    assert len(delays) == len(shortages)
    assert delays[:8] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, MAX_DELAY_S, MAX_DELAY_S]
    assert delays[-20:] == [MAX_DELAY_S] * 20
    assert restarts.after(ended(CRASH), lived_s=1.0, came_up=False) == StartAgain(MAX_DELAY_S), "its first crash"
    restarts.after(ended(CRASH), lived_s=1.0, came_up=True)
    assert restarts.after(REFUSED, lived_s=1.0, came_up=False) == StartAgain(0.5), "coming up is a new beginning"


def test_one_that_does_not_know_its_command_line_any_more_is_given_up_though_it_had_come_up() -> None:
    restarts = Restarts()
    restarts.after(ended(KILL), lived_s=1000.0, came_up=True)
    assert isinstance(restarts.after(ended(2, "usage"), lived_s=1.0, came_up=False), GiveUp)
