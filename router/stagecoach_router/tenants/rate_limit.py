"""A rate limit: a bucket that fills steadily and is taken from. Pure: the clock's reading comes in."""

from __future__ import annotations

# Added to each wait, so that the bucket is surely full enough after it, however floating point rounds.
_MARGIN_S = 0.001


class TokenBucket:
    """Allows `per_minute` units a minute, and as many at once.

    Who is let in while a unit is there may take more than there is; the bucket then owes them, and lets nobody in
    until they are made up for. That suits what is known only afterwards, such as the length of an answer. `now_s` is a
    clock that does not go back, in seconds.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        assert per_minute >= 1, per_minute
        self._per_minute = per_minute
        self._units = float(per_minute)  # negative: owed
        self._filled_at_s = now_s

    def wait_s(self, now_s: float, owing: float = 0.0) -> float:
        """How long until a unit may be taken, if nobody takes any before; 0.0: now. `owing` may be owed after that."""
        self._fill(now_s)
        missing = 1.0 - owing - self._units
        return missing * 60.0 / self._per_minute + _MARGIN_S if missing > 0 else 0.0

    def take(self, num_units: int, now_s: float) -> None:
        """Takes units, whether they are there or not."""
        self._fill(now_s)
        self._units -= num_units

    def resize(self, per_minute: int, now_s: float) -> None:
        """Another rate from now on. What is owed stays owed, and what was saved beyond the new size is lost."""
        self._fill(now_s)
        self._per_minute = per_minute
        self._units = min(self._units, float(per_minute))

    def _fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._filled_at_s)
        self._units = min(float(self._per_minute), self._units + elapsed_s * self._per_minute / 60.0)
        self._filled_at_s += elapsed_s
