"""Shares of a pool: what callers hold of something that there is only so much of. Pure.

A pool that is first come, first served is whoever's comes first. One with a fixed share for everyone is mostly empty,
as nobody knows how many will come. Here a share goes by what is free: a caller may have up to `ALPHA` times that (the
dynamic thresholds by which switches share their buffers; Choudhury and Hahne, 1998). So one that is alone has the use
of nearly all of the pool; the more there are, the smaller everyone's part; and there is room for one who comes new.
"""

from __future__ import annotations

from stagecoach.errors import Overloaded

# One caller may take 8/9 of a pool, two 8/17 each, n of them 8/(8 n + 1). Of a pool of up to 8, one may take all.
ALPHA = 8


class FairShare:
    """A pool of `size` units of `what`, such as "open calls"; callers are told apart by any text.

    Units that are held stay so, even if the caller would get fewer now: a share only decides who gets more.
    """

    def __init__(self, what: str, size: int) -> None:
        assert size >= 1, size
        self._what = what
        self.size = size
        self.num_held = 0
        self._held: dict[str, int] = {}  # by caller, of those that hold any

    @property
    def most_for_one(self) -> int:
        """How much a caller may take where nobody else holds anything."""
        return min(self.size, -(-ALPHA * self.size // (ALPHA + 1)))

    def held_by(self, caller: str) -> int:
        """How much a caller holds."""
        return self._held.get(caller, 0)

    def room_for(self, caller: str) -> int:
        """How much more a caller may take now. Each unit is one that may be taken by itself, after those before it."""
        free = self.size - self.num_held
        held = self.held_by(caller)
        # The last of k units is granted where held + k - 1 < ALPHA * (free - k + 1).
        most = -((held - ALPHA * free) // (ALPHA + 1))
        return max(0, min(free, most))

    def check(self, caller: str, amount: int = 1, *, retry_after_s: float = 0.0) -> None:
        """Raises what `take` would raise, and takes nothing."""
        room = self.room_for(caller)
        if amount <= room:
            return
        held = self.held_by(caller)
        text = f"{self.num_held} of {self.size} {self._what} are taken"
        if room < self.size - self.num_held:  # others would get more
            text += f", {held} of them by this caller, who may have {held + room} now"
        raise Overloaded(text, limit=held + room, value=held + amount, retry_after_s=retry_after_s)

    def take(self, caller: str, amount: int = 1, *, retry_after_s: float = 0.0) -> None:
        """Takes so much for a caller. Raises Overloaded where that is more than its share, and then takes nothing.

        The error's `limit` is what the caller may hold now, its `value` what it would hold.
        """
        self.check(caller, amount, retry_after_s=retry_after_s)
        self.force(caller, amount)

    def force(self, caller: str, amount: int = 1) -> None:
        """Takes so much whatever the share is: for what was let in before, by this process or a former one."""
        if amount:
            self.num_held += amount
            self._held[caller] = self.held_by(caller) + amount

    def give_back(self, caller: str, amount: int = 1) -> None:
        """Gives back what the caller took."""
        left = self.held_by(caller) - amount
        assert left >= 0, "nobody gives back what it did not take"
        self.num_held -= amount
        if left:
            self._held[caller] = left
        else:
            self._held.pop(caller, None)
