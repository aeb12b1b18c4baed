"""The waiting line is bounded in tokens as well, and says when to come back."""

from __future__ import annotations

import pytest

from stagecoach.errors import OutOfRange, Overloaded
from stagecoach_router.scheduling import waiting_queue as admission
from tests.unit.router.test_scheduler import add, finish, make_scheduler


def test_long_prompts_fill_the_line_before_its_places_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING_TOKENS", 50)
    scheduler = make_scheduler(max_running=1, max_waiting=100)
    first = add(scheduler, 1, 20)
    finish(scheduler, scheduler.schedule())
    for seq_id in (2, 3):
        add(scheduler, seq_id, 20)
    with pytest.raises(Overloaded, match="40 of 50 tokens"):
        add(scheduler, 4, 20)
    scheduler.remove(first)
    finish(scheduler, scheduler.schedule())
    add(scheduler, 5, 20)
    assert scheduler.num_waiting == 2


def test_a_prompt_above_the_limit_may_wait_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING_TOKENS", 10)
    scheduler = make_scheduler(max_running=1, max_waiting=100)
    add(scheduler, 1, 4)
    finish(scheduler, scheduler.schedule())
    add(scheduler, 2, 20)
    assert scheduler.num_waiting == 1


def test_who_fills_the_line_with_long_prompts_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING_TOKENS", 90)
    scheduler = make_scheduler(max_running=1, max_waiting=100)
    add(scheduler, 1, 4)
    finish(scheduler, scheduler.schedule())
    for seq_id in range(2, 6):
        add(scheduler, seq_id, 20, caller="greedy")
    with pytest.raises(Overloaded, match="by this caller"):
        add(scheduler, 6, 5, caller="greedy")
    add(scheduler, 7, 5, caller="honest")
    assert scheduler.num_waiting == 5


def test_all_completions_of_a_request_have_one_prompt_which_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING_TOKENS", 50)
    scheduler = make_scheduler(max_running=1, max_waiting=100)
    add(scheduler, 1, 4)
    finish(scheduler, scheduler.schedule())
    leader = add(scheduler, 2, 30)
    followers = [add(scheduler, seq_id, 30, leader=leader) for seq_id in range(3, 66)]
    assert scheduler.num_waiting == 64
    for sequence in (leader, *followers):
        scheduler.remove(sequence)
    add(scheduler, 66, 4)
    add(scheduler, 67, 40)


def test_places_are_asked_for_before_the_prompt_is_known() -> None:
    scheduler = make_scheduler(max_running=2, max_waiting=3)
    scheduler.check_room(5, now_s=0.0)
    add(scheduler, 1, 4)
    with pytest.raises(Overloaded) as caught:
        scheduler.check_room(5, now_s=0.0)
    assert caught.value.retry_after_s > 0


def test_more_completions_than_there_are_places_are_no_matter_of_time() -> None:
    with pytest.raises(OutOfRange) as caught:
        make_scheduler(max_running=2, max_waiting=3).check_room(6, now_s=0.0)
    assert (caught.value.field, caught.value.limit, caught.value.retryable) == ("n", "5", False)
