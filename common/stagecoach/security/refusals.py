"""Tells the operator of a server whom it does not let in, and why: the one who is refused may be a process of theirs.

A refusal costs the stranger nothing, so it must not cost us a line each: a host's are told once an hour, with how many
there were in between, no more hosts are remembered than fit a fixed number, and there are so many lines a minute.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from stagecoach.errors import StagecoachError
from stagecoach.rpc.addresses import host_of

logger = logging.getLogger(__name__)

MAX_HOSTS = 1024
REPEAT_AFTER_S = 3600.0
# Over all hosts: whoever has many addresses is not to fill a disk.
MAX_LINES_A_MINUTE = 60


@dataclass(slots=True)
class _Told:
    """What was logged of one host, and for one reason."""

    at_s: float
    num_since: int = 0


class RefusalLog:
    """Logs refusals. `now` is in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._told: OrderedDict[tuple[str, type[StagecoachError]], _Told] = OrderedDict()  # least lately refused first
        self._minute_began_s = -math.inf
        self._num_lines = 0  # since the minute began
        self._num_untold = 0

    def refused(self, peer: str, error: StagecoachError) -> None:
        """The one at `peer` (as gRPC names it) was refused with `error`, whose text must hold no secret."""
        now_s = self._now()
        key = host_of(peer), type(error)
        told = self._told.pop(key, None)
        if told is not None and now_s - told.at_s < REPEAT_AFTER_S:
            told.num_since += 1
            self._told[key] = told
            return
        if not self._may_tell(now_s):
            self._num_untold += 1
            return
        num_since = 0 if told is None else told.num_since
        again = f" ({num_since} more since the last time that this was said)" if num_since else ""
        logger.warning("refused %s: %s%s", peer, error, again)
        self._told[key] = _Told(now_s)
        if len(self._told) > MAX_HOSTS:
            self._told.popitem(last=False)

    def _may_tell(self, now_s: float) -> bool:
        """Whether there may be a line now. Says how many there were not, when the next minute begins."""
        if now_s - self._minute_began_s >= 60.0:
            if self._num_untold:
                logger.warning("%d more refusals, of more hosts than are told of in a minute", self._num_untold)
            self._minute_began_s, self._num_lines, self._num_untold = now_s, 0, 0
        self._num_lines += 1
        return self._num_lines <= MAX_LINES_A_MINUTE
