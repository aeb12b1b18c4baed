"""Hosts whose health checks were answered lately: each has a place of its own, whatever strangers do with the others.

A health check needs no key, so everybody who reaches the port shares the places for them, and enough hosts together may
take all of these. What an orchestrator would make of that is a dead router. But it has probed since the start.
"""

from __future__ import annotations

from stagecoach_router.frontend.open_calls import OpenCalls

MAX_HOSTS = 64
# Longer than between two probes, as anybody sets them.
KEEP_S = 120.0


class KnownProbers:
    """At most `max_hosts` hosts, who came first: more are not known, until one of these has not come for `keep_s`."""

    def __init__(self, max_hosts: int = MAX_HOSTS, keep_s: float = KEEP_S) -> None:
        # One more than there are hosts: so there is room for one place of each, by any share.
        self.calls = OpenCalls("health checks of known hosts", max_hosts + 1)
        self._max_hosts = max_hosts
        self._keep_s = keep_s
        self._answered_at_s: dict[str, float] = {}

    def has_place_for(self, host: str) -> bool:
        """Whether the host is known, and its place is free."""
        return host in self._answered_at_s and not self.calls.held_by(host)

    def answered(self, host: str, now_s: float) -> None:
        """A health check of the host was answered."""
        if host not in self._answered_at_s and len(self._answered_at_s) >= self._max_hosts:
            for each, at_s in list(self._answered_at_s.items()):
                if now_s - at_s > self._keep_s and not self.calls.held_by(each):
                    del self._answered_at_s[each]
            if len(self._answered_at_s) >= self._max_hosts:
                return
        self._answered_at_s[host] = now_s
