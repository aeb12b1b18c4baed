"""Time as one counts it who waits for a sign of life from somebody else. Pure: told the time.

A process that stood still itself (stopped, starved of its core, its machine asleep) finds on its return that long ago
was the last it heard, and answers that it has not read yet. So only time in which it looked counts.
"""

from __future__ import annotations

LOOKS_PER_TIMEOUT = 10


class WatchClock:
    """Seconds in which somebody looked, every `interval_s` at the latest: of a longer gap, two intervals count."""

    def __init__(self, interval_s: float) -> None:
        assert interval_s > 0.0, interval_s
        self.interval_s = interval_s
        self.now_s = 0.0
        self._looked_s: float | None = None

    def look(self, monotonic_s: float) -> float:
        """Counts the time since the last look; returns that of all."""
        if self._looked_s is not None:
            self.now_s += min(max(0.0, monotonic_s - self._looked_s), 2.0 * self.interval_s)
        self._looked_s = monotonic_s
        return self.now_s


class Silence:
    """Whether somebody has been silent for `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._clock = WatchClock(timeout_s / LOOKS_PER_TIMEOUT)
        self._heard_s = 0.0

    @property
    def interval_s(self) -> float:
        """How often to look."""
        return self._clock.interval_s

    def heard(self) -> None:
        """There was a sign of life."""
        self._heard_s = self._clock.now_s

    def is_over_limit(self, monotonic_s: float) -> bool:
        """Looks: whether nothing was heard for so long."""
        return self._clock.look(monotonic_s) - self._heard_s >= self.timeout_s
