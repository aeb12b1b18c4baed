"""Which addresses a listener takes: every one that its host stands for, all with one port, or none.

gRPC is content with one of them. With the others left to another process, some callers would get to that one, whoever
runs it, and gRPC says neither so nor why it cannot have an address.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable

from stagecoach.errors import ConfigError
from stagecoach.rpc.addresses import split_address

logger = logging.getLogger(__name__)

# Attempts to find a port that is free on all addresses, for a listener that wants any.
_MAX_ATTEMPTS = 20
# Of an address that this machine does not have, as ::1 where IPv6 is off: nobody else can be reached at it either.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

Resolve = Callable[[str], list[str]]


def resolve_host(host: str) -> list[str]:
    """The IPs that a host name stands for here. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(facts[4][0]) for facts in found))


def listen_addresses(address: str, resolve: Resolve = resolve_host) -> list[str]:
    """The addresses to bind for `address`, all with an IP for a host, and with a port where that is not left open.

    Raises ConfigError, naming the address and the reason, where one of them cannot be had. An address that this machine
    does not have is left out, as long as there is another.
    """
    host, port = split_address(address, "listen")
    ips = _ips(host, address, resolve)
    for _ in range(_MAX_ATTEMPTS):
        free, missing, taken = _try(ips, port)
        if taken is None:
            break
        if port or taken.errno != errno.EADDRINUSE:
            raise _cannot(address, taken)
    if taken is not None or not free:
        raise _cannot(address, taken or missing[0])
    for error in missing:
        logger.warning("listen: not on all addresses of %s: %s", address, error.strerror)
    return free


def _ips(host: str, address: str, resolve: Resolve) -> list[str]:
    if host.lower() == "localhost":  # so it is for callers, whatever /etc/hosts says: gRPC resolves it by itself
        return ["127.0.0.1", "::1"]
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host.strip("[]"))
        return [str((ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None) or ip)]
    try:
        return resolve(host)
    except (OSError, UnicodeError) as error:
        text = f"listen: cannot listen on {address}: {host} has no address here: {error}"
        raise ConfigError(text, field="listen", value=address) from error


def _try(ips: list[str], port: int) -> tuple[list[str], list[OSError], OSError | None]:
    """Takes all for a moment. Returns those that can be had, why others are not of this machine, and what is in use."""
    free: list[str] = []
    missing: list[OSError] = []
    with contextlib.ExitStack() as held:
        for ip in ips:
            for each in _both_families(ip):
                try:
                    port_here = _take(each, port, held)
                except OSError as error:
                    named = OSError(error.errno, f"{_bracketed(each)}: {os.strerror(error.errno or 0)}")
                    if error.errno not in _NOT_HERE:
                        return [], missing, named
                    if each == ip:
                        missing.append(named)
                    continue
                if len(ips) > 1:
                    port = port_here  # the same for all of them
                if each == ip:
                    free.append(f"{_bracketed(ip)}:{port}")
    return free, missing, None


def _both_families(ip: str) -> list[str]:
    """The IP, and for that of all interfaces the other family's, too, as gRPC listens on both for either."""
    return {"0.0.0.0": ["0.0.0.0", "::"], "::": ["::", "0.0.0.0"]}.get(ip, [ip])


def _bracketed(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip


def _take(ip: str, port: int, held: contextlib.ExitStack) -> int:
    """Binds the address while `held` is open. Returns the port. Raises OSError."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    taken = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does: connections that ended are no reason
    if family == socket.AF_INET6:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    taken.bind(socket.getaddrinfo(ip, port, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][4])
    return int(taken.getsockname()[1])


def _cannot(address: str, error: OSError) -> ConfigError:
    return ConfigError(f"listen: cannot listen on {address}: {error.strerror}", field="listen", value=address)
