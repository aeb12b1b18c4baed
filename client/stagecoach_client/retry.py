"""Whether a failed call is sent again, and when. Pure but for the clock and the dice, which come in."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable

from stagecoach.errors import Overloaded, StagecoachError, Unavailable

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
# The longest wait that a server's hint can lead to; one that asks for more is reported to the caller instead.
MAX_RETRY_AFTER_S = 10.0
# For a stream that broke: how long it is tried to go on with it. A router that restarts is back by then.
MAX_BREAK_S = 30.0
FIRST_REATTACH_DELAY_S = 0.05
MAX_REATTACH_DELAY_S = 1.0
_SHORTEST_TIMEOUT_S = 0.001
# What gRPC says of a call whose connection ended under it, and of one that never had a connection.
_CONNECTION_ENDED = re.compile(r"Socket closed|Connection reset|Broken pipe|GOAWAY|Cancelling all calls|ping timeout")
_NOT_CONNECTED = re.compile(r"failed to connect", re.IGNORECASE)


def connection_ended(details: str) -> bool:
    """Whether a call, by the `details` of its UNAVAILABLE, had reached a server before it failed.

    Where that is not clear it had not: then the call is tried again for a shorter time.
    """
    return _CONNECTION_ENDED.search(details) is not None and _NOT_CONNECTED.search(details) is None


class Attempts:
    """The attempts of one call: they share its deadline, and there are at most `max_retries` after the first.

    Retried are Unavailable, and Overloaded with a hint when to come back, as long as the server has not begun. Delays
    double, from the server's hint where there is one, with jitter, so that callers who failed together do not return
    together. A stream that breaks later is gone on with (`reattach_delay_s`), for `max_break_s` at a time and as often
    as it breaks with something new in between. While it is broken, Overloaded is no answer either: the request may be
    running, and everyone who lost the same server comes at once.
    """

    def __init__(
        self,
        timeout_s: float,
        max_retries: int,
        *,
        max_break_s: float = MAX_BREAK_S,
        clock: Callable[[], float] = time.monotonic,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._dice = dice
        self._deadline = clock() + timeout_s
        self._max_retries = max_retries
        self._num_retries = 0
        self._max_break_s = max_break_s
        self._broke_at: float | None = None  # None: it is not broken
        self._num_reattaches = 0

    def remaining_s(self) -> float:
        """What is left of the call's time, for the next attempt."""
        return max(_SHORTEST_TIMEOUT_S, self._deadline - self._clock())

    def delay_s(self, error: StagecoachError) -> float | None:
        """How long to wait before the next attempt, or None when `error` is the answer."""
        hint_s = error.retry_after_s
        if self._num_retries >= self._max_retries or hint_s > MAX_RETRY_AFTER_S:
            return None
        factor = 2.0**self._num_retries
        hinted_s = self._after(min(MAX_RETRY_AFTER_S, hint_s * factor))
        if isinstance(error, Unavailable) and error.retryable:
            backoff_s = min(MAX_DELAY_S, FIRST_DELAY_S * factor) * (0.5 + 0.5 * self._dice())
            delay_s = max(backoff_s, hinted_s)
        elif isinstance(error, Overloaded) and hint_s > 0:
            delay_s = hinted_s
        else:
            return None
        if self._clock() + delay_s >= self._deadline:
            return None
        self._num_retries += 1
        return delay_s

    def has_progressed(self) -> None:
        """Something new came: the next break is another one."""
        self._broke_at = None
        self._num_reattaches = 0

    def reattach_delay_s(self, error: StagecoachError) -> float | None:
        """How long to wait before the stream is gone on with, or None when `error` is its end."""
        now = self._clock()
        is_first = self._broke_at is None
        if self._broke_at is None:
            self._broke_at = now
        passes = isinstance(error, Unavailable) or (isinstance(error, Overloaded) and not is_first)
        if not (passes and error.retryable) or self._max_retries == 0:
            return None
        backoff_s = min(MAX_REATTACH_DELAY_S, FIRST_REATTACH_DELAY_S * 2.0 ** min(self._num_reattaches, 30))
        delay_s = max(backoff_s * (0.5 + 0.5 * self._dice()), self._after(error.retry_after_s))
        if now + delay_s >= min(self._deadline, self._broke_at + self._max_break_s):
            return None
        self._num_reattaches += 1
        return delay_s

    def _after(self, hint_s: float) -> float:
        """Not before the server said, and not everyone at once."""
        return max(0.0, hint_s) * (1.0 + 0.25 * self._dice())
