"""How a receiver of micro-batches gives credits back: a few at a time.

A message of one credit costs both ends as much of the event loop as a small frame does, and competes with the next
frame for it. A quarter of the window may be kept back, so at least three quarters of it can always be in use, and a
sender never waits for a credit that nothing more would set free.
"""

from __future__ import annotations


def usable_credits(size: int) -> int:
    """Of a window of `size` micro-batches, how many a sender can count on at any moment."""
    return size - max(1, size // 4) + 1


class CreditWindow:
    """Counts what is owed to one sender that may have `size` micro-batches on their way at a time."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self._batch = max(1, size // 4)
        self._owed = 0

    def give_back(self, credits: int) -> int:
        """So many micro-batches have moved on; returns how many credits to send now, 0 for none yet."""
        self._owed += credits
        if self._owed < self._batch:
            return 0
        due, self._owed = self._owed, 0
        return due
