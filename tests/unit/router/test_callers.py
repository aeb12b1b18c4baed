"""Whose share a call goes by."""

from __future__ import annotations

import pytest

from stagecoach.rpc.addresses import host_of
from stagecoach.security.api_keys import Grant
from stagecoach_router.tenants.caller import caller_of
from stagecoach_router.tenants.tenants import Tenant


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:51218", "10.0.0.7"),
        ("ipv6:%5B::1%5D:49282", "::/56"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:443", "2001:db8:1::/56"),
        ("ipv6:%5B2001:db8:1:2:ffff::1%5D:9", "2001:db8:1::/56"),
        ("ipv6:%5Bfe80::1%25eth0%5D:9", "fe80::/56"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:9", "10.0.0.7"),
        ("unix:", ""),
        ("unix-abstract:name", ""),
        ("", ""),
    ],
)
def test_a_host_is_an_ipv4_address_or_a_whole_ipv6_network(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_a_tenant_is_one_caller_wherever_it_calls_from_and_without_keys_each_host_is() -> None:
    ann, anyone = Tenant("ann", Grant(), 0.0), Tenant("", Grant(), 0.0)
    assert caller_of(ann, "ipv4:10.0.0.7:1") == caller_of(ann, "ipv4:10.0.0.8:1") == "ann"
    assert caller_of(anyone, "ipv4:10.0.0.7:1") == caller_of(anyone, "ipv4:10.0.0.7:2") == "10.0.0.7"
    assert caller_of(anyone, "ipv4:10.0.0.8:1") == "10.0.0.8"
