"""For how long a request is wanted: by the calls that read it, and by callers whose call broke. Pure."""

from __future__ import annotations

import math


class Demand:
    """Who wants one request, and until when, in seconds of one clock.

    Each call has a deadline of its own, and the request has the latest of them: no call can shorten what another was
    promised. A call that breaks is waited for, for its linger time and at most until its own deadline, after which its
    caller no longer wants the answer. Who comes back while nobody reads is taken to be the one that was waited for.
    """

    __slots__ = ("_awaited_until_s", "_deadlines_s")

    def __init__(self) -> None:
        self._deadlines_s: list[float] = []  # of the calls that read it
        self._awaited_until_s = -math.inf  # the callers whose calls broke

    @property
    def is_read(self) -> bool:
        """Whether any call reads it."""
        return bool(self._deadlines_s)

    @property
    def until_s(self) -> float:
        """When nobody wants it any more: -inf where nobody does, inf where a call has no deadline."""
        return max(self._awaited_until_s, *self._deadlines_s, -math.inf)

    def begin_call(self, deadline_s: float) -> None:
        """A call reads it from now on."""
        if not self._deadlines_s:
            self._awaited_until_s = -math.inf
        self._deadlines_s.append(deadline_s)

    def end_call(self, deadline_s: float, until_s: float) -> None:
        """A call that began with this deadline is over; its caller may come back until `until_s`."""
        self._deadlines_s.remove(deadline_s)
        self.await_caller(min(until_s, deadline_s))

    def await_caller(self, until_s: float) -> None:
        """Somebody who does not read it now may come until then."""
        self._awaited_until_s = max(self._awaited_until_s, until_s)
