"""Which finished requests are still known, so that a caller who comes back for one gets it. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
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


class Retention(Generic[KeyT]):
    """Keys of finished requests, the earliest finished first; what is too old or too much is forgotten.

    `num_tokens` of a request is what keeping it costs. The latest one is kept whatever it costs.
    """

    def __init__(
        self, *, max_age_s: float = MAX_AGE_S, max_requests: int = MAX_REQUESTS, max_tokens: int = MAX_TOKENS
    ) -> None:
        self._max_age_s = max_age_s
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._finished: OrderedDict[KeyT, _Finished] = OrderedDict()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._finished)

    def add(self, key: KeyT, num_tokens: int, now_s: float) -> list[KeyT]:
        """A request has finished. Returns the keys of those that are forgotten now."""
        former = self._finished.pop(key, None)
        if former is not None:
            self.num_tokens -= former.num_tokens
        self._finished[key] = _Finished(num_tokens, now_s)
        self.num_tokens += num_tokens
        return self.forget_old(now_s)

    def forget_old(self, now_s: float) -> list[KeyT]:
        """Forgets the requests that are past the limits; returns their keys."""
        forgotten: list[KeyT] = []
        for key, (num_tokens, finished_s) in self._finished.items():
            left = len(self._finished) - len(forgotten)
            fits = left <= self._max_requests and (self.num_tokens <= self._max_tokens or left == 1)
            if fits and now_s - finished_s <= self._max_age_s:
                break
            forgotten.append(key)
            self.num_tokens -= num_tokens
        for key in forgotten:
            del self._finished[key]
        return forgotten
