"""Whether a failed call is made again, and after how long. Pure: the clock and the random numbers are passed in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from stagecoach.errors import Overloaded, StagecoachError, Unavailable

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
# The longest wait that a server may ask for. One that asks for more is reported to the caller instead.
MAX_RETRY_AFTER_S = 10.0
# How long a stream that broke is tried to go on with. A router that restarts is back by then; and one to which the
# connection broke on our side alone has found that out, so that the calls that were lost take no places any more: that
# takes it the 30 s of gRPC's keepalive (stagecoach.rpc.channel).
MAX_BREAK_S = 45.0
FIRST_REATTACH_DELAY_S = 0.05
MAX_REATTACH_DELAY_S = 1.0
_SHORTEST_TIMEOUT_S = 0.001


class Attempts:
    """The attempts of one call: they share its deadline, and there are at most `max_retries` after the first.

    As long as the server has not begun, Unavailable is retried, and so is Overloaded if it says when to come back
    (`delay_s`). Delays double, from what the server asked for if it did, with jitter, so that callers who failed
    together do not come back together.

    A stream that breaks later is gone on with (`reattach_delay_s`): for `max_break_s` at a time, and as often as
    something new has come since the last break. While a stream is broken, Overloaded is retried even without a hint:
    the request may be running, and everyone who lost the same server comes back at once.
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
        self._broke_at: float | None = None  # by the clock; None while the stream is not broken
        self._num_reattaches = 0

    def remaining_s(self) -> float:
        """The deadline of the next attempt: what is left of the call's time."""
        return max(_SHORTEST_TIMEOUT_S, self._deadline - self._clock())

    def delay_s(self, error: StagecoachError) -> float | None:
        """How long to wait before the next attempt, or None if `error` is the answer."""
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
        """To be called when something new has come: the next break then has its whole time again."""
        self._broke_at = None
        self._num_reattaches = 0

    def reattach_delay_s(self, error: StagecoachError) -> float | None:
        """How long to wait before the broken stream is tried again, or None if `error` is its end."""
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
        """A delay that is not shorter than the server asked for, and not the same for everyone."""
        return max(0.0, hint_s) * (1.0 + 0.25 * self._dice())
