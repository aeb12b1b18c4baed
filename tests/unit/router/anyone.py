"""The caller of tests in which it does not matter who calls."""

from __future__ import annotations

from stagecoach.security.api_keys import Grant
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.tenants.tenants import Tenant

ANYONE = Caller("host", Tenant("", Grant(), 0.0))


class Metered(Tenant):
    """A tenant with a limit of tokens, and what it has been charged."""

    def __init__(self, tokens_per_minute: int) -> None:
        super().__init__("ann", Grant(tokens_per_minute=tokens_per_minute), 0.0)
        self.num_charged = 0

    def charge(self, num_tokens: int, now_s: float) -> None:
        self.num_charged += num_tokens
        super().charge(num_tokens, now_s)
