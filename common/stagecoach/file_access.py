"""Work on files that may hang, as on a network mount that is gone: beside the event loop, and with a limit in time.

A thread that hangs in the kernel cannot be ended. Those of here are daemons: the process ends without them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

# A file of some megabytes that has not been read by then hangs, as far as anybody can tell.
FILE_TIMEOUT_S = 10.0


async def read_in_time(read: Callable[[], Result], what: str, timeout_s: float | None = None) -> Result:
    """What `read` returns, done on a thread of its own. Raises what it raises.

    Raises TimeoutError, naming `what`, where it takes longer than `timeout_s`, by default FILE_TIMEOUT_S; the thread is
    then left to itself.
    """
    return await in_time(on_thread(read), what, FILE_TIMEOUT_S if timeout_s is None else timeout_s)


def on_thread(read: Callable[[], Result]) -> Future[Result]:
    """Has `read` done on a thread of its own."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()  # from now on nobody can cancel it

    def run() -> None:
        try:
            result = read()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="files", daemon=True).start()
    return future


class BoundedReads:
    """Reads for whoever asks, on `max_threads` threads at most: those that hang, and will for ever, are among them."""

    def __init__(self, max_threads: int) -> None:
        self._free = asyncio.Semaphore(max_threads)

    async def read(self, read: Callable[[], Result], what: str) -> Result:
        """As read_in_time. Raises TimeoutError, too, where no thread has become free within that time."""
        try:
            async with asyncio.timeout(FILE_TIMEOUT_S):
                await self._free.acquire()
        except TimeoutError:
            text = f"{what} could not be read in {FILE_TIMEOUT_S:g} s: too many reads hang, or wait for a slow disk"
            raise TimeoutError(text) from None
        try:
            reading = on_thread(read)
        except BaseException:  # there are no more threads
            self._free.release()
            raise
        asyncio.wrap_future(reading).add_done_callback(self._thread_ended)
        return await in_time(reading, what, FILE_TIMEOUT_S)

    def _thread_ended(self, reading: asyncio.Future[Result]) -> None:
        reading.exception()  # whoever waits is told; here nobody does
        self._free.release()


async def in_time(reading: Future[Result], what: str, timeout_s: float) -> Result:
    """What comes of `reading`. Raises TimeoutError, naming `what`, where it takes longer than that from now on."""
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(reading)
    except TimeoutError:
        if reading.done():  # it was `read` that raised it: a network file system's
            raise
        raise TimeoutError(f"{what} could not be read in {timeout_s:g} s: is its disk there?") from None
