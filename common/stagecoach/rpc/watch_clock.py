"""How long somebody else has given no sign of life, as told by a process that may have stood still itself. Pure.

A process that was stopped, starved of its core or asleep with its machine finds on its return that it has heard nothing
for a long time, while the answers wait unread. So only the time in which it was looking counts.
"""

from __future__ import annotations

LOOKS_PER_TIMEOUT = 10


class WatchClock:
    """Counts the seconds between looks, of which there is to be one each `interval_s`. A longer gap counts as two."""

    def __init__(self, interval_s: float) -> None:
        assert interval_s > 0.0, interval_s
        self.interval_s = interval_s
        self.now_s = 0.0
        self._looked_s: float | None = None

    def look(self, monotonic_s: float) -> float:
        """Counts the time since the last look. Returns all that was counted."""
        if self._looked_s is not None:
            self.now_s += min(max(0.0, monotonic_s - self._looked_s), 2.0 * self.interval_s)
        self._looked_s = monotonic_s
        return self.now_s


class Silence:
    """Tells whether somebody has been silent for `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._clock = WatchClock(timeout_s / LOOKS_PER_TIMEOUT)
        self._heard_s = 0.0

    @property
    def interval_s(self) -> float:
        """The pause between two looks."""
        return self._clock.interval_s

    def heard(self) -> None:
        """There was a sign of life."""
        self._heard_s = self._clock.now_s

    def is_over_limit(self, monotonic_s: float) -> bool:
        """Looks, and says whether nothing was heard for `timeout_s`."""
        return self._clock.look(monotonic_s) - self._heard_s >= self.timeout_s
