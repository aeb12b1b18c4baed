"""What the address of a process looks like: HOST:PORT, an IPv6 host in brackets. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from urllib.parse import unquote

from stagecoach.errors import InvalidArgument

# How many addresses one list may have.
MAX_ADDRESSES = 1024

# Whoever has one IPv6 address has, as a rule, all of its /64; providers give their customers a /56, and some a /48.
_IPV6_HOST_BITS = 56
_MAX_HOST_LENGTH = 253
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def is_loopback(host: str) -> bool:
    """Whether only this machine's processes can reach a listener on `host`, which is as `split_address` returns it.

    The only name for which that is so is `localhost`: where another one leads is up to the resolver.
    """
    if host.lower() == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def host_of(peer: str) -> str:
    """The host of a connection, as gRPC names it: "ipv4:1.2.3.4:5", "ipv6:%5B::1%5D:5".

    All of an IPv6 /56 are one host, and so are all that come without an address, through a Unix socket.
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


def check_address(address: str, field: str, *, listening: bool = False) -> str:
    """Returns `address` if it is HOST:PORT, with an IPv6 host in brackets. Else raises InvalidArgument with `field`.

    The port is 1 to 65535. When `listening` it may also be 0, which means any free port.
    """
    host, port = split_address(address, field)
    first_port = 0 if listening else 1
    if not first_port <= port <= 65535:
        limit = f"[{first_port}, 65535]"
        raise InvalidArgument(f"{field}: port {port} is not in {limit}", field=field, limit=limit, value=address)
    if host.startswith("["):
        _check_ip(host[1:-1], 6, address, field)
    elif re.fullmatch(r"[0-9.]+", host):
        _check_ip(host, 4, address, field)
    elif len(host) > _MAX_HOST_LENGTH or not _HOST_NAME.fullmatch(host):
        raise _malformed(address, field, f"{host[:80]!r} is not a host name")
    return address


def read_addresses(text: str, field: str) -> list[str]:
    """The addresses in "HOST:PORT,HOST:PORT". Raises InvalidArgument with `field`, also where one is there twice."""
    parts = text.split(",", MAX_ADDRESSES)
    if len(parts) > MAX_ADDRESSES:
        raise InvalidArgument(f"{field}: more than {MAX_ADDRESSES} addresses", field=field, limit=MAX_ADDRESSES)
    addresses = [check_address(part.strip(), field) for part in parts]
    twice = next((address for address, count in Counter(addresses).items() if count > 1), None)
    if twice is not None:
        raise InvalidArgument(f"{field}: {twice} is named twice", field=field, value=twice)
    return addresses


def split_address(address: str, field: str) -> tuple[str, int]:
    """The host (an IPv6 one still in its brackets) and the port of HOST:PORT. Neither is checked any further."""
    if not isinstance(address, str):
        raise _malformed(repr(address), field, "it is not a string")
    if "//" in address:
        raise _malformed(address, field, "leave the scheme out")
    match = re.fullmatch(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]+):(?P<port>[0-9]{1,6})", address)
    if match is None:
        reason = "put an IPv6 host in brackets" if address.count(":") > 1 and "[" not in address else ""
        raise _malformed(address, field, reason)
    return match["host"], int(match["port"])


def _check_ip(text: str, version: int, address: str, field: str) -> None:
    try:
        ipaddress.IPv6Address(text) if version == 6 else ipaddress.IPv4Address(text)
    except ValueError as error:
        raise _malformed(address, field, f"{text!r} is not an IPv{version} address") from error


def _malformed(address: str, field: str, reason: str) -> InvalidArgument:
    text = f"{field} must be HOST:PORT, for example 127.0.0.1:50050; got {address[:200]!r}"
    return InvalidArgument(f"{text} ({reason})" if reason else text, field=field, limit="HOST:PORT", value=address)
