"""Work on large requests beside the event loop: one at a time, and each caller has its turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text.serial_queue import SerialQueue

Message = TypeVar("Message")
Result = TypeVar("Result")

# Of a request, that are looked at on the event loop: 0.2 ms of work.
MAX_BYTES_ON_LOOP = 1 << 16
# Of the requests that wait, together: some 0.2 s of work.
MAX_BYTES = 64 << 20


class LargeMessages:
    """Turns large messages into what they hold. That needs the interpreter's lock, but lets go of it every 5 ms."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._line = SerialQueue("to be read", "bytes of requests", max_bytes)

    async def read(self, work: Callable[[Message], Result], message: Message, num_bytes: int, caller: Caller) -> Result:
        """What `work` makes of a message, or a part of it, in a request of `num_bytes`. A small one does not wait.

        Raises Overloaded where too much waits, or has waited for too long.
        """
        if num_bytes <= MAX_BYTES_ON_LOOP:
            return work(message)

        def start() -> asyncio.Future[Result]:
            return asyncio.get_running_loop().run_in_executor(None, work, message)

        return await self._line.run(caller.name, num_bytes, start)
