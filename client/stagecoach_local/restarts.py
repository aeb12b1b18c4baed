"""Whether a process that ended is started again, and when. Pure.

A process has come up when it does its job: a router answers, a shard has its layers. One that came up and ends is
started again however often that happens, as whatever ended it may have come from outside; one that ends again and again
before it came up never will.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_local.child_process import Ended

# In a row, without having come up in between.
MAX_FAILED_STARTS = 5
# The first time at once; while it goes on dying young, later and later.
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0
# Who came up and lived so long did not die young.
SETTLED_S = 30.0
# The exit status of a command line that is wrong, and of an error that somebody has to act on
# (stagecoach.process.lifecycle), which a crash in Python shares; the error's line tells them apart.
_WRONG_USAGE = 2
_ERROR = 1
_ERROR_MARK = ": error: "
# Such an error, and one that passes: whoever has the port, perhaps only for a connection of its own, lets it go.
PORT_IS_TAKEN = "cannot listen on"


@dataclass(frozen=True, slots=True)
class StartAgain:
    """So long after it ended."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """`why`: as the end of a sentence that says how the process ended."""

    why: str


class Restarts:
    """What one process's deaths come to."""

    def __init__(self) -> None:
        self._num_failed_starts = 0
        self._num_young_deaths = 0

    def after(self, ended: Ended, *, lived_s: float, came_up: bool) -> StartAgain | GiveUp:
        """What to do about a process that has `ended`."""
        self._num_failed_starts = 0 if came_up else self._num_failed_starts + 1
        if not came_up and is_mistake(ended):
            return GiveUp("which a new start does not mend")
        if came_up and lived_s >= SETTLED_S:
            self._num_young_deaths = 0
        return self._next()

    def after_no_start(self) -> StartAgain | GiveUp:
        """What to do about one that has ended, and that the system could not start again just now."""
        self._num_failed_starts += 1
        return self._next()

    def _next(self) -> StartAgain | GiveUp:
        if self._num_failed_starts >= MAX_FAILED_STARTS:
            return GiveUp(f"and did not come up {self._num_failed_starts} times in a row")
        self._num_young_deaths += 1
        if self._num_young_deaths == 1:
            return StartAgain(0.0)
        return StartAgain(min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._num_young_deaths - 2, 30)))


def is_mistake(ended: Ended) -> bool:
    """Whether one of our processes ended because of its settings, or of what they name: it would end so again."""
    if ended.status == _WRONG_USAGE:
        return True
    last_line = ended.last_lines[-1] if ended.last_lines else ""
    return ended.status == _ERROR and _ERROR_MARK in last_line and PORT_IS_TAKEN not in last_line
