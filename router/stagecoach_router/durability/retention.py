"""Which finished requests are still known, so that a caller who comes back for one gets it. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from heapq import heapify, heappop, heapreplace
from typing import Generic, NamedTuple, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)

# How long an answer waits for a caller whose connection broke before its end.
MAX_AGE_S = 60.0
MAX_REQUESTS = 1024
# Prompts and outputs together. A token that is kept costs some 100 bytes with its delta; log-probabilities count extra.
MAX_TOKENS = 131_072


class _Finished(NamedTuple):
    num_tokens: int
    finished_s: float
    owner: str


class _Held(Generic[KeyT]):
    """What is kept for one caller; keys in the order in which their requests finished."""

    def __init__(self) -> None:
        self.keys: OrderedDict[KeyT, None] = OrderedDict()
        self.num_tokens = 0


class Retention(Generic[KeyT]):
    """Keys of finished requests, the earliest finished first; what is too old or too much is forgotten.

    `num_tokens` of a request is what keeping it costs. The latest one is kept whatever it costs. Room for it is made by
    the earliest of whoever holds the most, so that nobody's many answers cost another the one that it comes back for.
    """

    def __init__(
        self, *, max_age_s: float = MAX_AGE_S, max_requests: int = MAX_REQUESTS, max_tokens: int = MAX_TOKENS
    ) -> None:
        self._max_age_s = max_age_s
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._finished: OrderedDict[KeyT, _Finished] = OrderedDict()
        self._held: dict[str, _Held[KeyT]] = {}  # by owner, of those that hold any
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._finished)

    def add(self, key: KeyT, num_tokens: int, now_s: float, owner: str = "") -> list[KeyT]:
        """A request of `owner` has finished. Returns the keys of those that are forgotten now."""
        if key in self._finished:
            self._drop(key)
        forgotten = self.forget_old(now_s)
        while self._finished and len(self._finished) >= self._max_requests:
            forgotten.append(self._drop_of(max(self._held.values(), key=lambda held: len(held.keys))))
        if self.num_tokens + num_tokens > self._max_tokens:
            forgotten += self._make_room(num_tokens)
        self._finished[key] = _Finished(num_tokens, now_s, owner)
        held = self._held.setdefault(owner, _Held())
        held.keys[key] = None
        held.num_tokens += num_tokens
        self.num_tokens += num_tokens
        return forgotten

    def forget_old(self, now_s: float) -> list[KeyT]:
        """Forgets the requests that are too old; returns their keys."""
        forgotten: list[KeyT] = []
        while self._finished:
            key, finished = next(iter(self._finished.items()))
            if now_s - finished.finished_s <= self._max_age_s:
                break
            self._drop(key)
            forgotten.append(key)
        return forgotten

    def _make_room(self, num_tokens: int) -> list[KeyT]:
        forgotten: list[KeyT] = []
        most = [(-held.num_tokens, owner) for owner, held in self._held.items()]  # a heap: one may take the room of all
        heapify(most)
        while most and self.num_tokens + num_tokens > self._max_tokens:
            owner = most[0][1]
            held = self._held[owner]
            forgotten.append(self._drop_of(held))
            if held.keys:
                heapreplace(most, (-held.num_tokens, owner))
            else:
                heappop(most)
        return forgotten

    def _drop_of(self, held: _Held[KeyT]) -> KeyT:
        """Forgets the earliest of what a caller holds."""
        key = next(iter(held.keys))
        self._drop(key)
        return key

    def _drop(self, key: KeyT) -> None:
        finished = self._finished.pop(key)
        held = self._held[finished.owner]
        del held.keys[key]
        held.num_tokens -= finished.num_tokens
        if not held.keys:
            del self._held[finished.owner]
        self.num_tokens -= finished.num_tokens
