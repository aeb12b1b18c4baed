"""Only time in which somebody looked counts."""

from __future__ import annotations

from stagecoach.rpc.watch_clock import Silence, WatchClock


def test_regular_looks_count_all_time():
    clock = WatchClock(0.5)
    assert [clock.look(100.0 + 0.5 * index) for index in range(4)] == [0.0, 0.5, 1.0, 1.5]


def test_of_a_long_pause_of_ones_own_two_intervals_count():
    clock = WatchClock(0.5)
    clock.look(100.0)
    assert clock.look(160.0) == 1.0


def test_a_clock_that_goes_back_counts_nothing():
    clock = WatchClock(0.5)
    clock.look(100.0)
    assert clock.look(90.0) == 0.0


def test_silence_is_over_its_limit_after_the_timeout_and_not_before():
    silence = Silence(10.0)
    assert silence.interval_s == 1.0
    assert [silence.is_over_limit(float(second)) for second in range(12)] == [False] * 10 + [True] * 2


def test_each_word_begins_the_silence_anew():
    silence = Silence(10.0)
    for second in range(60):
        assert not silence.is_over_limit(float(second))
        if second % 9 == 0:
            silence.heard()


def test_who_stood_still_does_not_blame_the_other_side():
    silence = Silence(10.0)
    assert not silence.is_over_limit(0.0)
    assert not silence.is_over_limit(3600.0)
