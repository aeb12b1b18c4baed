"""Whoever makes a call: by which share it is let in, and whom its work is charged to."""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach.rpc.addresses import host_of
from stagecoach_router.tenants.tenants import Tenant


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` tells callers apart where they share something; all hosts that call without keys are one `tenant`."""

    name: str
    tenant: Tenant


def caller_of(tenant: Tenant, peer: str) -> str:
    """The name of whoever calls: the tenant's, or the host of its connection where everybody is one tenant."""
    return tenant.name or host_of(peer)
