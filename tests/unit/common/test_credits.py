"""Credits come back a few at a time, all of them, and never so late that a sender is stuck."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.rpc.credits import CreditWindow


@given(size=st.integers(1, 64), given_back=st.lists(st.integers(1, 5), max_size=50))
def test_less_than_a_quarter_is_kept_back_and_nothing_is_lost(size, given_back):
    window = CreditWindow(size)
    sent = sum(window.give_back(credits) for credits in given_back)
    kept = sum(given_back) - sent
    assert 0 <= kept <= (size - 1) // 4


@pytest.mark.parametrize(("size", "messages"), [(1, 8), (2, 8), (7, 8), (8, 4), (16, 2), (32, 1)])
def test_fewer_messages_than_credits(size, messages):
    window = CreditWindow(size)
    assert sum(window.give_back(1) > 0 for _ in range(8)) == messages


def test_the_first_grant_goes_out_whole():
    assert CreditWindow(8).give_back(8) == 8
