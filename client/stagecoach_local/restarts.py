"""Whether a process that ended is started again, and after how long. Pure.

A process has come up when it does its job: a router answers, a shard has its layers. If it ends after that, it is
started again however often that happens, since the cause may lie outside of it. If it crashes again and again before it
came up, it never will.

Where a process has come up before, its settings were good once. Whatever it then finds wrong as it starts, be it killed
for want of memory or refuse what memory and disk there are, may pass as it has come: it is tried again without end.

To wait before a start is for what would go wrong again at once: a process that fails while it starts, or that crashes.
One that did its job until somebody killed it is not at fault, so it is started again at once. Only when that happens
dozens of times in a row is it a loop, too, as on a machine that has run out of memory, and is slowed down.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_local.process_exit import Ended

# How often a process may crash before it comes up; and how often one that has never come up may end if the last time it
# was killed, since whoever kills it may well stop doing that.
MAX_FAILED_STARTS = 5
MAX_KILLED_STARTS = 10
# How often in a row one that came up is started again at once after it was killed.
MAX_KILLS_AT_ONCE = 32
# The first restart is immediate. While the process goes on dying young, each further one comes later.
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0
# Of one that was killed while it started, the first MAX_KILLED_STARTS times: waiting does not make that less likely.
MAX_KILLED_START_DELAY_S = 1.0
# A process that came up and lived for so long did not die young.
SETTLED_S = 30.0


@dataclass(frozen=True, slots=True)
class StartAgain:
    """The decision to start the process again, so long after it ended."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The decision to leave the process dead. `why` completes a sentence that says how it ended."""

    why: str


class Restarts:
    """Counts one process's deaths, and decides after each."""

    def __init__(self) -> None:
        self._has_come_up = False  # ever
        # In a row: how often it did not come up, and how often of these it crashed.
        self._num_failed_starts = 0
        self._num_crashed_starts = 0
        # Since it last lived for SETTLED_S: how often it ended by itself after it came up, and how often it was killed.
        self._num_crashes = 0
        self._num_kills = 0

    def after(self, ended: Ended, *, lived_s: float, came_up: bool) -> StartAgain | GiveUp:
        """What to do about a process that has ended after `lived_s`."""
        if not came_up:
            self._num_failed_starts += 1
            if ended.was_misused or (ended.was_mistaken and not self._has_come_up):
                return GiveUp("which a new start does not mend")
            if ended.was_killed:
                within = self._num_failed_starts < MAX_KILLED_STARTS
                return self._next(MAX_KILLED_STARTS, most_s=MAX_KILLED_START_DELAY_S if within else MAX_DELAY_S)
            if ended.was_mistaken:
                return self._next(MAX_FAILED_STARTS)
            self._num_crashed_starts += 1
            if self._num_crashed_starts >= MAX_FAILED_STARTS:
                return self._give_up()
            return self._next(MAX_FAILED_STARTS)
        self._has_come_up = True
        self._num_failed_starts = self._num_crashed_starts = 0
        if lived_s >= SETTLED_S:
            self._num_crashes = self._num_kills = 0
        if ended.was_killed:
            self._num_kills += 1
        else:
            self._num_crashes += 1
        return StartAgain(self._delay_s())

    def after_no_start(self) -> StartAgain | GiveUp:
        """What to do about a process that the system could not start again just now."""
        self._num_failed_starts += 1
        return self._next(MAX_FAILED_STARTS, least_s=FIRST_DELAY_S)

    def _next(self, max_failed_starts: int, least_s: float = 0.0, most_s: float = MAX_DELAY_S) -> StartAgain | GiveUp:
        """`max_failed_starts`: of one that has never come up."""
        if self._num_failed_starts >= max_failed_starts and not self._has_come_up:
            return self._give_up()
        return StartAgain(min(most_s, max(least_s, self._delay_s())))

    def _give_up(self) -> GiveUp:
        return GiveUp(f"and did not come up {self._num_failed_starts} times in a row")

    def _delay_s(self) -> float:
        num_deaths = self._num_failed_starts + self._num_crashes + max(0, self._num_kills - MAX_KILLS_AT_ONCE)
        return 0.0 if num_deaths <= 1 else min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(num_deaths - 2, 30))
