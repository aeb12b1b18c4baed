"""Who calls, as far as shares of what there is are concerned: a tenant where there are keys, otherwise a host. Pure."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

from stagecoach_router.tenants.tenants import Tenant

# Whoever has one IPv6 address has, as a rule, all of its /64.
_IPV6_HOST_BITS = 64


def caller_of(tenant: Tenant, peer: str) -> str:
    """Whose share a call goes by: the tenant's name, or the host of its connection where everybody is one tenant."""
    return tenant.name or host_of(peer)


def host_of(peer: str) -> str:
    """The host of a connection, as gRPC names it: "ipv4:1.2.3.4:5", "ipv6:%5B::1%5D:5".

    All of an IPv6 /64 are one host, and so are all that come without an address, through a Unix socket.
    """
    kind, _, address = peer.partition(":")
    host = address.rpartition(":")[0]
    if kind == "ipv4":
        return host
    if kind != "ipv6":
        return ""
    try:
        ip = ipaddress.IPv6Address(unquote(host).strip("[]").partition("%")[0])
    except ValueError:
        return host
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((ip, _IPV6_HOST_BITS), strict=False))
