"""Where the processes of a cluster on this machine listen, and where they are called."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from stagecoach.errors import ConfigError
from stagecoach.rpc.addresses import split_address

# Addresses that stand for all of this machine's, and the loopback address at which such a listener is called from here.
WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def free_addresses(wanted: Sequence[str]) -> list[str]:
    """The `wanted` addresses, with a free port instead of each port 0.

    Somebody else may still take a port before it is used. Raises ConfigError for an address that nobody can listen on.
    """
    addresses = []
    with contextlib.ExitStack() as held:  # all are held at the same time, so that no two get the same port
        for address in wanted:
            host, port = split_address(address, "listen")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            try:
                listener = held.enter_context(socket.create_server((host.strip("[]"), port), family=family))
            except OSError as error:
                text = f"cannot listen on {address}: {error.strerror or error}"
                raise ConfigError(text, field="listen", value=address) from error
            addresses.append(f"{host}:{listener.getsockname()[1]}")
    return addresses


def address_to_call(listen: str) -> str:
    """Where a process that listens on `listen` is called from this machine."""
    host, port = split_address(listen, "listen")
    return f"{WILDCARD_HOSTS.get(host, host)}:{port}"
