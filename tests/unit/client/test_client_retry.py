"""Which failures are tried again, how long after, and when no more."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import (
    Cancelled,
    InternalError,
    InvalidArgument,
    Overloaded,
    ShardFault,
    StagecoachError,
    Unavailable,
)
from stagecoach_client.retry import MAX_DELAY_S, MAX_RETRY_AFTER_S, Attempts
from stagecoach_client.settings import DEFAULT_MAX_RETRIES, Settings


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(
    timeout_s: float = 1000.0, max_retries: int = 3, clock: Clock | None = None, dice: float = 1.0
) -> Attempts:
    return Attempts(timeout_s, max_retries, clock=clock or Clock(), dice=lambda: dice)


def test_delays_double() -> None:
    call = attempts(max_retries=4)
    assert [call.delay_s(Unavailable("x")) for _ in range(5)] == [0.1, 0.2, 0.4, 0.8, None]


@given(st.floats(0, 1), st.integers(0, 30))
def test_delays_stay_under_the_cap_and_above_half(dice: float, retries: int) -> None:
    call = attempts(max_retries=retries + 1, dice=dice)
    for _ in range(retries):
        call.delay_s(Unavailable("x"))
    delay_s = call.delay_s(Unavailable("x"))
    assert delay_s is not None
    assert min(MAX_DELAY_S, 0.1 * 2.0**retries) / 2 <= delay_s <= MAX_DELAY_S


def test_a_full_server_is_asked_again_when_it_said_and_not_before() -> None:
    delay_s = attempts(dice=0.5).delay_s(Overloaded("full", retry_after_s=3.0))
    assert delay_s is not None
    assert 3.0 <= delay_s <= 3.75


def test_the_servers_hint_outweighs_a_shorter_delay_and_doubles() -> None:
    call = attempts(max_retries=5, dice=0.0)
    delays_s = [call.delay_s(Unavailable("no pipeline yet", retry_after_s=1.0)) for _ in range(5)]
    assert delays_s == [1.0, 2.0, 4.0, 8.0, MAX_RETRY_AFTER_S]
    assert attempts().delay_s(Unavailable("x", retry_after_s=0.01)) == 0.1


def test_a_cluster_that_is_starting_gets_ten_seconds_with_the_defaults() -> None:
    call = attempts(max_retries=DEFAULT_MAX_RETRIES, dice=0.0)
    waited_s = 0.0
    while (delay_s := call.delay_s(Unavailable("no pipeline yet", retry_after_s=1.0))) is not None:
        waited_s += delay_s
    assert waited_s > 10


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full"),
        Unavailable("later", retry_after_s=MAX_RETRY_AFTER_S + 1),
        Overloaded("full", retry_after_s=MAX_RETRY_AFTER_S + 1),
        ShardFault("x"),
        InternalError("x"),
        Cancelled("x"),
        InvalidArgument("x"),
    ],
)
def test_other_errors_are_final(error: StagecoachError) -> None:
    assert attempts().delay_s(error) is None


def test_no_retries_means_none() -> None:
    assert attempts(max_retries=0).delay_s(Unavailable("x")) is None


def test_all_attempts_share_one_deadline() -> None:
    clock = Clock()
    call = attempts(timeout_s=10.0, clock=clock)
    clock.now_s += 4.0
    assert call.remaining_s() == 6.0
    clock.now_s += 5.95
    assert call.delay_s(Unavailable("x")) is None  # would be over before the next attempt
    clock.now_s += 5.0
    assert 0 < call.remaining_s() < 0.01


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("target", {"target": "nowhere"}),
        ("timeout_s", {"timeout_s": 0.0}),
        ("timeout_s", {"timeout_s": None}),
        ("connect_timeout_s", {"connect_timeout_s": -1.0}),
        ("max_retries", {"max_retries": -1}),
        ("max_retries", {"max_retries": True}),
    ],
)
def test_a_client_cannot_be_made_from_nonsense(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Settings(**arguments)  # type: ignore[arg-type]
    assert caught.value.field == field
