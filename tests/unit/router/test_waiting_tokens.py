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
    with pytest.raises(Overloaded, match="40 tokens"):
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
