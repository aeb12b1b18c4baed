"""Who is refused is told to wait as long as the line takes, by how fast it moved while it was full."""

from __future__ import annotations

from stagecoach_router.scheduling.retry_after import FIRST_S, MAX_S, MIN_S, WINDOW_S, RetryAfter


def refuse(
    delay: RetryAfter, *, per_s: float, num_waiting: int, start_s: float, seconds: float, left: int = 0
) -> float:
    """Refusals ten times a second, while the line moves by `per_s`; the last hint."""
    hint_s = 0.0
    for tick in range(int(seconds * 10) + 1):
        hint_s = delay.after_s(num_waiting, left + int(tick / 10 * per_s), start_s + tick / 10)
    return hint_s


def test_the_hint_is_the_time_that_the_whole_line_takes() -> None:
    assert abs(refuse(RetryAfter(), per_s=5.0, num_waiting=32, start_s=0.0, seconds=20.0) - 33 / 5.0) < 0.5
    assert abs(refuse(RetryAfter(), per_s=20.0, num_waiting=32, start_s=0.0, seconds=20.0) - 33 / 20.0) < 0.2


def test_while_nothing_is_known_it_is_a_second() -> None:
    assert RetryAfter().after_s(32, 0, 100.0) == FIRST_S


def test_it_stays_within_its_bounds() -> None:
    assert refuse(RetryAfter(), per_s=0.0, num_waiting=32, start_s=0.0, seconds=9.0) == MAX_S
    assert refuse(RetryAfter(), per_s=1000.0, num_waiting=1, start_s=0.0, seconds=9.0) == MIN_S


def test_a_line_that_becomes_slower_is_noticed_within_two_windows() -> None:
    delay = RetryAfter()
    refuse(delay, per_s=20.0, num_waiting=20, start_s=0.0, seconds=20.0)
    assert refuse(delay, per_s=2.0, num_waiting=20, start_s=20.1, seconds=2 * WINDOW_S + 1, left=400) > 9.0


def test_quiet_time_says_nothing_of_the_speed() -> None:
    """An hour in which ten came and went does not make the line seem slow."""
    delay = RetryAfter()
    busy_s = refuse(delay, per_s=10.0, num_waiting=30, start_s=0.0, seconds=20.0)
    assert delay.after_s(30, 210, 3600.0) == busy_s


def test_with_what_left_before_the_first_refusal_nothing_is_reckoned() -> None:
    delay = RetryAfter()
    delay.after_s(10, 1_000_000, 50.0)
    assert abs(delay.after_s(10, 1_000_004, 51.0) - 2.75) < 0.01


def test_that_nobody_left_for_a_moment_does_not_make_the_line_slow() -> None:
    assert refuse(RetryAfter(), per_s=0.0, num_waiting=32, start_s=0.0, seconds=2.0) == FIRST_S
