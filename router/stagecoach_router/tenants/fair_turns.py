"""Whose turn it is, where one after the other has the use of something: whoever has used it least. Pure.

It goes by the time that turns took, not by their number or by how large they looked: a caller whose turns are long gets
fewer of them. Who comes new, or comes back, begins at what the next in line has used: it is next soon, and what it did
not use while it was away it does not get later (start-time fair queuing; Goyal, Vin and Cheng, 1996). What somebody
used while nobody waited was taken from nobody: when nobody waits any more, all begin anew.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import Generic, TypeVar

# Callers of whom it is known what they have used. Beyond that, those who have used the least are as if they came new.
MAX_REMEMBERED = 2048

Item = TypeVar("Item")


class FairTurns(Generic[Item]):
    """Those that wait. A caller's own items are in the order in which they came; callers are told apart by any text."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Item]] = {}  # by caller, of those with any
        self._used_s: dict[str, float] = {}
        self._by_used: list[tuple[float, str]] = []  # a heap of the same, in which former figures may still be
        self._least_s = 0.0  # of whoever had the last turn, when it began

    def wait(self, caller: str, item: Item) -> None:
        """The caller's item waits for its turn."""
        self._waiting.setdefault(caller, deque()).append(item)

    def leave(self, caller: str, item: Item) -> None:
        """It waits no more. Harmless where it does not."""
        items = self._waiting.get(caller)
        if items is not None and item in items:
            items.remove(item)
            if not items:
                del self._waiting[caller]

    def next(self) -> Item | None:
        """Takes the item whose turn it is; None where nobody waits. To be asked whenever a turn has ended."""
        if not self._waiting:
            self._used_s.clear()
            self._by_used.clear()
            self._least_s = 0.0
            return None
        caller = min(self._waiting, key=self._used)  # of equals, the one that has waited longest
        self._least_s = self._used(caller)
        items = self._waiting.pop(caller)
        item = items.popleft()
        if items:
            self._waiting[caller] = items  # behind its equals
        return item

    def used(self, caller: str, turn_s: float) -> None:
        """A turn of the caller's has ended, and took so long."""
        self._used_s[caller] = self._used(caller) + turn_s
        heappush(self._by_used, (self._used_s[caller], caller))
        while self._by_used and (self._by_used[0][0] <= self._least_s or len(self._used_s) > MAX_REMEMBERED):
            used_s, name = heappop(self._by_used)
            if self._used_s.get(name) == used_s:  # else it has had another turn since
                del self._used_s[name]

    def _used(self, caller: str) -> float:
        return max(self._used_s.get(caller, 0.0), self._least_s)
