"""A process's life: an event loop, a listening socket that is really ours, an orderly stop on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

import grpc.aio
import uvloop

from stagecoach.channel import check_address, server_options
from stagecoach.errors import ConfigError, StagecoachError

logger = logging.getLogger(__name__)


def run(program: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Runs `main(stop)` until it returns; a signal sets `stop`. Returns the exit status.

    A typed error ends the process with status 1 and one line on stderr.
    """

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    try:
        uvloop.run(supervised())
    except StagecoachError as error:
        print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def listen(max_message_bytes: int, address: str, max_calls: int | None = None) -> tuple[grpc.aio.Server, int]:
    """A gRPC server, not yet started, bound to `address`, and its port (chosen by the system for port 0).

    Beyond `max_calls` at a time, calls are refused with RESOURCE_EXHAUSTED.

    Raises ConfigError where another process has the port.
    """
    check_address(address, "listen", listening=True)
    server = grpc.aio.server(options=server_options(max_message_bytes), maximum_concurrent_rpcs=max_calls)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"listen: cannot listen on {address}: is the port in use?", field="listen", value=address
        ) from error
    if port == 0:
        raise ConfigError(f"listen: cannot listen on {address}: is the port in use?", field="listen", value=address)
    return server, port
