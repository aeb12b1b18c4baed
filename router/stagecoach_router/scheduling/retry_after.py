"""When a caller may come again that found the queue full: when the whole queue has moved on. Pure."""

from __future__ import annotations

# A hint below it would bring callers back before anything has changed; one above it is a guess about another time.
MIN_S = 0.5
MAX_S = 30.0
# Given while nothing is known of how fast the line moves.
FIRST_S = 1.0
# The speed is that of the last one to two windows.
WINDOW_S = 5.0
# Less time, or fewer that have left, says too little of a speed; but when a whole window has passed, it is slow.
MIN_WINDOW_S = 1.0
MIN_LEFT = 3


class RetryAfter:
    """Watches, from one refusal to the next, how many have left a line that is full.

    Only refusals count, because a line that is not full moves as fast as others come, which says nothing of how fast it
    could. Where none came for more than a window, the measuring starts anew, with the last known speed until there is
    another. `num_left` is how many have left the line so far, `now_s` a clock that does not go back, in seconds.
    """

    def __init__(self) -> None:
        self.delay_s = FIRST_S  # the last one
        self._per_s: float | None = None
        self._asked_s = float("-inf")
        # Where this window began and where the one before it did.
        self._began = self._before = (0.0, 0)

    def after_s(self, num_waiting: int, num_left: int, now_s: float) -> float:
        """When, in seconds from now, as many as wait have left, and the one that asks would be next."""
        if now_s - self._asked_s > WINDOW_S:
            self._began = self._before = (now_s, num_left)
        self._asked_s = now_s
        since_s, then = self._before
        measured_s = now_s - since_s
        if measured_s >= WINDOW_S or (measured_s >= MIN_WINDOW_S and num_left - then >= MIN_LEFT):
            self._per_s = (num_left - then) / measured_s
        if now_s - self._began[0] >= WINDOW_S:
            self._before, self._began = self._began, (now_s, num_left)
        if self._per_s is not None:
            self.delay_s = _bounded((num_waiting + 1) / self._per_s if self._per_s > 0 else MAX_S)
        return self.delay_s


def _bounded(seconds: float) -> float:
    return min(MAX_S, max(MIN_S, seconds))
