"""A process's life: an event loop, and an orderly stop on SIGTERM, SIGINT and SIGHUP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import uvloop

from stagecoach.errors import StagecoachError
from stagecoach.visible_text import visible

# For what is left to do when all work has ended: closing the event loop, removing temporary files.
EXIT_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


def run(program: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> int:
    """Runs `main(stop)` until it returns. Returns the exit status.

    The first signal sets `stop`, and `main` is to end in its own time; a second one cancels it. A typed error ends the
    process with status 1 and one line on stderr. Once `main` has ended, the process ends soon, whatever its threads do.
    """

    async def supervised() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        running = asyncio.ensure_future(main(stop))

        def on_signal() -> None:
            if stop.is_set():
                running.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup has SIGHUP ignored, and asks for that; a script's background job has SIGINT so, and does not.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, on_signal)
        status = 1
        try:
            await running
            status = 0
        except asyncio.CancelledError:
            if not stop.is_set():
                raise
            logger.warning("stopped at once, as a second signal asked")
            status = 0
        except StagecoachError as error:
            _end_in_time(status)  # already now: nobody may be reading what we say
            _say(visible(f"{program}: error: {error}"))
        finally:
            _end_in_time(status)
        return status

    return uvloop.run(supervised())


def _say(line: str) -> None:
    for handler in logging.root.handlers:  # what was logged before comes before
        handler.flush()
    with contextlib.suppress(OSError, ValueError):  # nobody reads it, or there is no room for it
        print(line, file=sys.stderr, flush=True)  # noqa: T201


def _end_in_time(status: int) -> None:
    """Ends this process if it has not ended by itself in EXIT_TIMEOUT_S.

    Python waits for the threads of executors, for as long as it takes, and a thread may hang on a disk for good.
    """

    def end() -> None:
        time.sleep(EXIT_TIMEOUT_S)
        os._exit(status)

    threading.Thread(target=end, name="end", daemon=True).start()
