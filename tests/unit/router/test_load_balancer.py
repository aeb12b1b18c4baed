"""Requests go where they fit, are served, wait least, and find their prefix: in this order."""

from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.engine.load_balancer import MIN_TOLERANCE, ReplicaLoad, choose_replica, relative_speeds


def load(num_sequences=0, num_cached_tokens=0, *, fits=True, ready=True, speed=1.0):
    return ReplicaLoad(num_sequences, num_cached_tokens, fits, ready, speed)


def test_a_request_that_fits_no_replica_gets_none():
    assert choose_replica([]) is None
    assert choose_replica([load(fits=False), load(fits=False)]) is None


def test_a_request_goes_where_it_fits_however_busy_that_is():
    assert choose_replica([load(0, 50, fits=False), load(99)]) == 1


def test_a_ready_replica_comes_before_an_idle_one_that_is_not():
    assert choose_replica([load(0, 50, ready=False), load(99)]) == 1


def test_a_request_waits_at_a_replica_that_is_not_ready_where_none_is():
    assert choose_replica([load(3, ready=False), load(2, ready=False)]) == 1


def test_the_least_busy_replica_is_taken():
    assert choose_replica([load(5), load(4), load(6)]) == 1


def test_a_cached_prefix_is_worth_a_few_sequences_more():
    assert choose_replica([load(0), load(MIN_TOLERANCE, 64)]) == 1
    assert choose_replica([load(0), load(MIN_TOLERANCE + 1, 64)]) == 0


def test_what_a_prefix_is_worth_grows_with_the_load():
    assert choose_replica([load(40), load(50, 64)]) == 1
    assert choose_replica([load(40), load(51, 64)]) == 0


def test_the_longest_of_the_cached_prefixes_wins_and_then_the_least_busy():
    assert choose_replica([load(0, 16), load(1, 48), load(2, 32)]) == 1
    assert choose_replica([load(2, 48), load(1, 48)]) == 1


def test_of_replicas_that_are_alike_the_first_is_taken():
    assert choose_replica([load(1, 8), load(1, 8)]) == 0


def test_requests_of_one_cached_prompt_do_not_all_pile_up_at_one_replica():
    counts = [0, 0, 0]
    for _ in range(90):
        index = choose_replica([load(count, 500 if place == 0 else 0) for place, count in enumerate(counts)])
        counts[index] += 1
    assert min(counts) >= 25


def test_of_idle_replicas_the_fastest_is_taken():
    assert choose_replica([load(speed=0.2), load(speed=1.0), load(speed=0.5)]) == 1


def test_replicas_get_requests_by_their_speed():
    speeds, counts = (1.0, 0.25), [0, 0]
    for _ in range(100):
        counts[choose_replica([load(count, speed=speed) for count, speed in zip(counts, speeds, strict=True)])] += 1
    assert 75 <= counts[0] <= 85


def test_speeds_are_relative_to_the_fastest_and_equal_as_long_as_one_is_unknown():
    assert relative_speeds([0.02, 0.01, 0.04]) == [0.5, 1.0, 0.25]
    assert relative_speeds([0.02, None]) == [1.0, 1.0]


LOADS = st.lists(
    st.builds(ReplicaLoad, st.integers(0, 40), st.integers(0, 3), st.booleans(), st.booleans()), max_size=8
)


@given(LOADS)
def test_the_choice_fits_is_ready_if_any_is_and_no_other_is_better_in_every_way(loads):
    index = choose_replica(loads)
    fitting = [each for each in loads if each.fits]
    if index is None:
        assert not fitting
        return
    chosen = loads[index]
    assert chosen.fits
    assert chosen.ready or not any(each.ready for each in fitting)
    for each in fitting:
        if each.ready == chosen.ready:
            assert not (
                each.num_sequences < chosen.num_sequences and each.num_cached_tokens >= chosen.num_cached_tokens
            )
