"""Which of several pipelines gets a request. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# How many more sequences than the least busy replica one may have, and still get a request for its cached prefix: a
# quarter of the least, or these few where that is less. A cached prefix saves its prefill once. A sequence more in the
# batch makes each of the request's tokens come later, but only by its own share of a step; and a replica that all
# requests of one long system prompt prefer must not fill up while others stand idle.
TOLERANCE = 0.25
MIN_TOLERANCE = 2


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica, as one request sees it."""

    num_sequences: int  # running and waiting
    num_cached_tokens: int  # of the prompt in question, in its prefix cache
    fits: bool  # whether the request fits its K/V cache
    ready: bool
    speed: float = 1.0  # of one sequence's tokens, beside that of the others
    away_s: float = 0.0  # for how long it has not been ready
    has_room: bool = True  # whether its queue takes the request

    @property
    def delay(self) -> float:
        """How much the other sequences there would delay the request: how many there are with it, by the speed."""
        return (self.num_sequences + 1) / self.speed


def choose_replica(loads: Sequence[ReplicaLoad]) -> int | None:
    """The index of the replica for a request. None: it fits none.

    One that is ready, or else has not been for the shortest time; among those, one whose queue has room for it, where
    there is one; among those that are about as busy, for their speed, as the least busy one, that with the longest
    cached prefix; then the least busy; then the first.
    """
    fitting = [index for index, load in enumerate(loads) if load.fits]
    if not fitting:
        return None
    chosen = [index for index in fitting if loads[index].ready]
    if not chosen:  # that which was lost last may be back first
        shortest_s = min(loads[index].away_s for index in fitting)
        chosen = [index for index in fitting if loads[index].away_s == shortest_s]
    chosen = [index for index in chosen if loads[index].has_room] or chosen
    least = min(loads[index].delay for index in chosen)
    most = least + max(MIN_TOLERANCE, least * TOLERANCE)
    return min(
        (index for index in chosen if loads[index].delay <= most),
        key=lambda index: (-loads[index].num_cached_tokens, loads[index].delay, index),
    )


def relative_speeds(token_s: Sequence[float | None]) -> list[float]:
    """The speeds of replicas whose tokens take so long, the fastest being 1; where one is unknown, all are 1."""
    known = [seconds for seconds in token_s if seconds is not None and seconds > 0]
    if len(known) < len(token_s):
        return [1.0] * len(token_s)
    return [min(known) / seconds for seconds in known]
