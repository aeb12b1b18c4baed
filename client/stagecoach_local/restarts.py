"""Whether a process that ended is started again, and after how long. Pure.

A process has come up when it does its job: a router answers, a shard has its layers. If it ends after that, it is
started again however often that happens, since the cause may lie outside of it. If it ends again and again before it
came up, it never will.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_local.process_exit import Ended

# How often in a row a process may end before it came up.
MAX_FAILED_STARTS = 5
# The first restart is immediate. While the process goes on dying young, each further one comes later.
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 10.0
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
        self._num_failed_starts = 0  # in a row
        self._num_young_deaths = 0  # since it last lived for SETTLED_S

    def after(self, ended: Ended, *, lived_s: float, came_up: bool) -> StartAgain | GiveUp:
        """What to do about a process that has ended after `lived_s`."""
        self._num_failed_starts = 0 if came_up else self._num_failed_starts + 1
        if not came_up and ended.was_mistaken:
            return GiveUp("which a new start does not mend")
        if came_up and lived_s >= SETTLED_S:
            self._num_young_deaths = 0
        return self._next()

    def after_no_start(self) -> StartAgain | GiveUp:
        """What to do about a process that the system could not start again just now."""
        self._num_failed_starts += 1
        return self._next()

    def _next(self) -> StartAgain | GiveUp:
        if self._num_failed_starts >= MAX_FAILED_STARTS:
            return GiveUp(f"and did not come up {self._num_failed_starts} times in a row")
        self._num_young_deaths += 1
        if self._num_young_deaths == 1:
            return StartAgain(0.0)
        return StartAgain(min(MAX_DELAY_S, FIRST_DELAY_S * 2.0 ** min(self._num_young_deaths - 2, 30)))
