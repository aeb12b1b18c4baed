"""The port that a server process listens on. No process shares it, and without TLS no other machine reaches it."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections.abc import Sequence

import grpc.aio

from stagecoach.errors import ConfigError
from stagecoach.process.listen_addresses import listen_addresses
from stagecoach.rpc.addresses import check_address, is_loopback, split_address
from stagecoach.rpc.channel import peer_limits, public_limits, server_options
from stagecoach.security.tls import Identity

# For a server to stop, beyond the time that calls have to end.
STOP_TIMEOUT_S = 3.0
# An idle connection takes some 50 KB.
MAX_CONNECTIONS = 4096

logger = logging.getLogger(__name__)


def listen(
    max_message_bytes: int,
    address: str,
    *,
    public: bool = False,
    identity: Identity | None = None,
    insecure: bool = False,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> tuple[grpc.aio.Server, int]:
    """A gRPC server that is bound to `address` and not yet started, and its port (for port 0, one that is free).

    A `public` server is one that strangers can reach: there are limits on connections, and on the calls of each. Those
    of all connections together are for the server to count. With an `identity` the server speaks TLS only. Without one
    it listens on loopback only, unless it is told to be `insecure`.

    It listens on every address that the host stands for. Raises ConfigError where it may not listen there, and where
    another process has the port of one of them.
    """
    check_address(address, "listen", listening=True)
    if identity is None and not insecure:
        _check_loopback(address)
    options = server_options(max_message_bytes)
    options += public_limits(max_connections()) if public else peer_limits()
    credentials = None if identity is None else identity.server_credentials()
    server = grpc.aio.server(interceptors=interceptors, options=options)
    port = 0
    for each in listen_addresses(address):
        if identity is None and not insecure:
            _check_loopback(each)  # wherever the name leads to
        try:
            port = server.add_insecure_port(each) if credentials is None else server.add_secure_port(each, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            text = f"listen: cannot listen on {address}: another process took it just now"
            raise ConfigError(text, field="listen", value=address)
    return server, port


async def stop_server(server: grpc.aio.Server, grace_s: float) -> None:
    """Lets calls end for `grace_s`, then cuts them off. A server that does not stop by then is left to itself.

    A thread of gRPC that hangs, as while it writes to a standard error that nobody reads, would keep it for good.
    """
    stopping = asyncio.ensure_future(server.stop(grace_s))
    done, _ = await asyncio.wait([stopping], timeout=grace_s + STOP_TIMEOUT_S)
    if not done:
        logger.error("the server has not stopped in %g s", grace_s + STOP_TIMEOUT_S)


def max_connections() -> int:
    """How many connections strangers may open: as many as half of the files that this process may have open.

    With none left it could neither open its own files nor reach its shards.
    """
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft_limit // 2))


def _check_loopback(address: str) -> None:
    host, _ = split_address(address, "listen")
    if not is_loopback(host):
        raise ConfigError(
            f"listen: {address} is open to other machines, and without TLS to anyone on the way: give --tls-cert, "
            "--tls-key and --tls-ca (`stagecoach certs` makes them) or, on a network that you trust, --insecure-listen",
            field="listen",
            limit="a loopback address",
            value=address,
        )
