"""How a receiver of micro-batches gives credits back to the sender: a few at a time.

A credit is the right to send one micro-batch, and there is a window of them. A message that brings back a single one
would cost both ends as much of the event loop as a small frame does. So the receiver collects a quarter of the window
first: three quarters are always in use or free, and a sender never waits for a credit that no further message brings.
"""

from __future__ import annotations

# The largest window that a receiver may open.
MAX_CREDITS = 1024


def usable_credits(size: int) -> int:
    """How many credits of a window of `size` a sender can always count on: the receiver may collect the others."""
    return size - max(1, size // 4) + 1


class CreditWindow:
    """Counts what is owed to one sender that may have `size` micro-batches on their way at a time."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self._batch = max(1, size // 4)
        self._owed = 0

    def give_back(self, credits: int) -> int:
        """Adds credits of micro-batches that moved on. Returns how many to send now, or 0 to collect more first."""
        self._owed += credits
        if self._owed < self._batch:
            return 0
        due, self._owed = self._owed, 0
        return due
