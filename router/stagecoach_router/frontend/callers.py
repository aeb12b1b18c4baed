"""Who calls, as far as shares of what there is are concerned: a tenant where there are keys, otherwise a host. Pure."""

from __future__ import annotations

from stagecoach.rpc.addresses import host_of
from stagecoach_router.tenants.tenants import Tenant


def caller_of(tenant: Tenant, peer: str) -> str:
    """Whose share a call goes by: the tenant's name, or the host of its connection where everybody is one tenant."""
    return tenant.name or host_of(peer)
