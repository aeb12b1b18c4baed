"""Turns go to whoever has used least time, and nobody waits longer for another's having waited long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stagecoach_router.tenants.fair_turns import MAX_REMEMBERED, FairTurns


def take(turns: FairTurns[str], turn_s: float, count: int) -> str:
    """Whose turns follow, each of them so long; items are named after their callers."""
    taken = []
    for _ in range(count):
        item = turns.next()
        assert item is not None
        turns.used(item, turn_s)
        taken.append(item)
    return "".join(taken)


def waiting(items: str) -> FairTurns[str]:
    turns: FairTurns[str] = FairTurns()
    for item in items:
        turns.wait(item, item)
    return turns


def test_those_of_one_caller_are_in_the_order_in_which_they_came() -> None:
    turns: FairTurns[int] = FairTurns()
    for item in range(5):
        turns.wait("ann", item)
    assert [turns.next() for _ in range(6)] == [0, 1, 2, 3, 4, None]


def test_callers_take_turns_whoever_came_first() -> None:
    assert take(waiting("aaaaabbbc"), 1.0, 9) == "abcababaa"


def test_who_comes_to_a_long_line_is_next() -> None:
    turns = waiting("a" * 100)
    assert take(turns, 1.0, 50) == "a" * 50
    turns.wait("b", "b")
    assert take(turns, 1.0, 3)[0] == "b"


def test_who_has_long_turns_has_fewer() -> None:
    turns = waiting("a" * 10 + "b" * 10)
    order = []
    for _ in range(11):
        item = turns.next()
        assert item is not None
        turns.used(item, 5.0 if item == "a" else 1.0)
        order.append(item)
    assert "".join(order) == "abbbbbabbbb"


def test_what_was_not_used_while_away_is_not_had_later() -> None:
    turns = waiting("a" * 100 + "b")
    take(turns, 1.0, 60)
    for _ in range(50):
        turns.wait("b", "b")
    order = take(turns, 1.0, 20)
    assert order.count("b") in (10, 11)


def test_what_was_used_while_nobody_waited_is_held_against_nobody() -> None:
    turns: FairTurns[str] = FairTurns()
    for _ in range(100):
        turns.used("a", 1.0)  # it did not have to wait for its turn
        assert turns.next() is None
    for item in "aaaabbbb":
        turns.wait(item, item)
    assert take(turns, 1.0, 8) == "abababab"


def test_nothing_is_remembered_of_those_who_come_while_nobody_waits() -> None:
    turns: FairTurns[str] = FairTurns()
    for number in range(1000):
        turns.used(f"host {number}", 1.0)
        assert turns.next() is None
        assert not turns._used_s


def test_nothing_is_remembered_of_those_who_have_used_no_more_than_the_next_in_line() -> None:
    turns = waiting("a" * 1000)
    for number in range(400):
        turns.wait(f"host {number}", f"host {number}")
        take(turns, 1.0, 2)
        assert len(turns._used_s) <= 3


def test_what_leaves_has_no_turn() -> None:
    turns = waiting("ab")
    turns.leave("a", "a")
    turns.leave("a", "a")
    turns.leave("nobody", "a")
    assert [turns.next(), turns.next()] == ["b", None]


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 20)), min_size=1, max_size=60),
    st.data(),
)
def test_while_two_wait_neither_gets_ahead_by_more_than_a_turn_of_each(
    items: list[tuple[str, int]], data: st.DataObject
) -> None:
    turns: FairTurns[tuple[str, int]] = FairTurns()
    left: dict[str, int] = {}
    for caller, turn_s in items:
        turns.wait(caller, (caller, turn_s))
        left[caller] = left.get(caller, 0) + 1
    everyone, used = set(left), dict.fromkeys(left, 0)
    while all(left[caller] for caller in everyone):  # from the start on all of them wait
        item = turns.next()
        assert item is not None
        caller, turn_s = item
        turns.used(caller, turn_s)
        left[caller] -= 1
        used[caller] += turn_s
        assert max(used.values()) - min(used.values()) <= 20


def test_of_callers_without_end_only_so_many_are_remembered() -> None:
    turns: FairTurns[str] = FairTurns()
    turns.wait("greedy", "greedy")
    assert turns.next() == "greedy"
    turns.used("greedy", 1e6)
    turns.wait("greedy", "greedy")
    for number in range(3 * MAX_REMEMBERED):
        turns.wait(f"host {number}", "once")
        assert turns.next() == "once"
        turns.used(f"host {number}", 1.0)
        assert len(turns._used_s) <= len(turns._by_used) <= MAX_REMEMBERED
    turns.wait("host", "host")
    assert turns.next() == "host", "who has used the most is not forgotten"
