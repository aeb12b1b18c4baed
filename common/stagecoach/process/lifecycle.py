"""A process's life: an event loop, and an orderly stop on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable

import uvloop

from stagecoach.errors import StagecoachError

logger = logging.getLogger(__name__)


def run(program: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Runs `main(stop)` until it returns. Returns the exit status.

    The first signal sets `stop`, and `main` is to end in its own time; a second one cancels it. A typed error ends the
    process with status 1 and one line on stderr.
    """

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(main(stop))

        def on_signal() -> None:
            if stop.is_set():
                running.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            await running
        except asyncio.CancelledError:
            if not stop.is_set():
                raise
            logger.warning("stopped at once, as a second signal asked")

    try:
        uvloop.run(supervised())
    except StagecoachError as error:
        print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
