from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.durability.retention import Retention


def test_what_is_too_old_is_forgotten() -> None:
    remembered = Retention[str](max_age_s=10.0)
    assert remembered.add("a", 5, 100.0) == []
    assert remembered.add("b", 5, 106.0) == []
    assert remembered.forget_old(110.0) == []
    assert remembered.forget_old(110.1) == ["a"]
    assert (len(remembered), remembered.num_tokens) == (1, 5)


def test_the_earliest_make_room_for_the_latest() -> None:
    by_count = Retention[str](max_requests=2)
    assert [by_count.add(key, 1, 0.0) for key in "abc"] == [[], [], ["a"]]
    by_tokens = Retention[str](max_tokens=10)
    assert [by_tokens.add(key, 4, 0.0) for key in "abc"] == [[], [], ["a"]]


def test_the_latest_is_kept_whatever_it_costs() -> None:
    remembered = Retention[str](max_tokens=10)
    remembered.add("a", 1, 0.0)
    assert remembered.add("b", 1000, 0.0) == ["a"]
    assert len(remembered) == 1


def test_the_answers_of_one_caller_cost_no_other_its_own() -> None:
    by_tokens = Retention[str](max_tokens=100)
    by_tokens.add("mine", 30, 0.0, "ann")
    forgotten = [key for number in range(50) for key in by_tokens.add(f"b{number}", 20, 0.0, "bob")]
    assert forgotten == [f"b{number}" for number in range(47)]
    by_count = Retention[str](max_requests=4)
    by_count.add("mine", 30, 0.0, "ann")
    forgotten = [key for number in range(50) for key in by_count.add(f"b{number}", 0, 0.0, "bob")]
    assert forgotten == [f"b{number}" for number in range(47)]
    assert by_count.forget_old(100.0) == ["mine", "b47", "b48", "b49"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.floats(0, 5))))
def test_tokens_add_up_and_stay_within_the_limits(events: list[tuple[int, int, float]]) -> None:
    remembered = Retention[int](max_age_s=7.0, max_requests=4, max_tokens=60)
    known: dict[int, int] = {}
    now_s = 0.0
    for key, num_tokens, later_s in events:
        now_s += later_s
        known.pop(key, None)
        known[key] = num_tokens
        for forgotten in remembered.add(key, num_tokens, now_s, f"caller {key % 3}"):
            del known[forgotten]
        assert remembered.num_tokens == sum(known.values())
        assert len(remembered) == len(known) <= 4
        assert remembered.num_tokens <= 60 or len(known) == 1
