"""Hosts whose health checks were answered lately: each has places of its own, whatever strangers do with the others.

A health check needs no key, so everybody who reaches the port shares the places for them, and enough hosts together may
take all of these. What an orchestrator would make of that is a dead router. But it has probed since the start.
"""

from __future__ import annotations

from stagecoach_router.frontend.open_calls import OpenCalls

MAX_HOSTS = 32
# An orchestrator asks from one host whether we live and whether we are ready.
PLACES_EACH = 2
# One more than all hosts can hold: so there is room for each of them, by any share.
MAX_CALLS = MAX_HOSTS * PLACES_EACH + 1
# Longer than between two probes, as anybody sets them.
KEEP_S = 120.0


class KnownProbers:
    """At most `max_hosts` hosts, who came first: more are not known, until one of these has not come for `keep_s`."""

    def __init__(self, max_hosts: int = MAX_HOSTS, keep_s: float = KEEP_S) -> None:
        assert max_hosts <= MAX_HOSTS, max_hosts
        self.calls = OpenCalls("health checks of known hosts", MAX_CALLS)
        self._max_hosts = max_hosts
        self._keep_s = keep_s
        self._answered_at_s: dict[str, float] = {}

    def has_place_for(self, host: str) -> bool:
        """Whether the host is known, and one of its places is free."""
        return host in self._answered_at_s and self.calls.held_by(host) < PLACES_EACH

    def answered(self, host: str, now_s: float) -> None:
        """A health check of the host was answered."""
        if host not in self._answered_at_s and len(self._answered_at_s) >= self._max_hosts:
            for each, at_s in list(self._answered_at_s.items()):
                if now_s - at_s > self._keep_s and not self.calls.held_by(each):
                    del self._answered_at_s[each]
            if len(self._answered_at_s) >= self._max_hosts:
                return
        self._answered_at_s[host] = now_s
