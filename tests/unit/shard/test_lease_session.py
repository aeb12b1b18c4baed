"""How long a shard waits for a word of a lease's router, and how many reports it owes it."""

from __future__ import annotations

import pytest

from stagecoach_shard.leases.lease import Lease
from stagecoach_shard.leases.session import MIN_OPENING_SILENCE_S, LeaseSession, LoadReportDue

START_S = 5000.0


def make_session(silence_timeout_s: float) -> LeaseSession:
    lease = Lease(1, 1, first_block=0, num_blocks=1, block_size=4, max_slots=1, context_length=4, max_batch_tokens=4)
    return LeaseSession(lease, silence_timeout_s)


def silent_after_s(session: LeaseSession, *, longest_s: float, begin_s: float = START_S) -> float | None:
    """When it was given up, looking every 50 ms; None where it was not for `longest_s`."""
    for look in range(int(longest_s / 0.05) + 1):
        if session.is_silent(begin_s + 0.05 * look):
            return 0.05 * look
    return None


@pytest.mark.parametrize("timeout_s", [0.5, 10.0])
def test_a_router_that_opens_slowly_is_given_the_time_that_opening_may_take(timeout_s: float) -> None:
    given_up_s = silent_after_s(make_session(timeout_s), longest_s=60.0)
    assert given_up_s == pytest.approx(MIN_OPENING_SILENCE_S, abs=0.2)


@pytest.mark.parametrize("opening_s", [0.0, 19.0])
def test_from_its_first_question_on_the_next_one_is_due_in_its_own_time(opening_s: float) -> None:
    session = make_session(0.5)
    assert silent_after_s(session, longest_s=opening_s) is None
    session.asked_for_report(1)
    begin_s = START_S + opening_s
    assert silent_after_s(session, longest_s=0.4, begin_s=begin_s) is None
    session.asked_for_report(2)
    assert silent_after_s(session, longest_s=5.0, begin_s=begin_s + 0.4) == pytest.approx(0.5, abs=0.2)


def test_a_timeout_longer_than_opening_takes_holds_from_the_first_moment() -> None:
    assert silent_after_s(make_session(40.0), longest_s=60.0) == pytest.approx(40.0, abs=0.2)


def test_without_a_timeout_a_router_may_be_silent_for_ever() -> None:
    session = make_session(0.0)
    assert silent_after_s(session, longest_s=100.0) is None
    session.asked_for_report(1)
    assert silent_after_s(session, longest_s=100.0, begin_s=START_S + 100.0) is None


def test_a_router_that_asks_and_does_not_read_is_owed_one_report() -> None:
    session = make_session(1.0)
    for number in (1, 2, 3):
        session.asked_for_report(number)
    assert session.outbox.qsize() == 1
    due = session.outbox.get_nowait()
    assert isinstance(due, LoadReportDue)
    assert due.number == 3
