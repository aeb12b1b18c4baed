"""Long texts on their way to tokens: one at a time, on another thread, and only so many bytes of them wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from stagecoach.errors import Overloaded

Result = TypeVar("Result")

# Four requests of the largest size, a few seconds of one core's work.
MAX_BYTES = 16 * 2**20
RETRY_AFTER_S = 2.0


class TokenizerWorker:
    """One text is encoded at a time, so that the event loop keeps a core.

    A caller that goes away leaves the line at once; where its text is being encoded, which nothing can stop, its place
    is taken until that has ended.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._turn = asyncio.Semaphore(1)

    @property
    def num_bytes(self) -> int:
        """Of what waits or is encoded now."""
        return self._num_bytes

    async def encode(self, num_bytes: int, work: Callable[[], Result]) -> Result:
        """What `work` returns, called on another thread. Raises what it raises, and Overloaded where too much waits."""
        if self._num_bytes and self._num_bytes + num_bytes > self._max_bytes:
            raise Overloaded(
                f"{self._num_bytes} bytes of text wait to be tokenized; at most {self._max_bytes} may",
                limit=self._max_bytes,
                value=self._num_bytes,
                retry_after_s=RETRY_AFTER_S,
            )
        self._num_bytes += num_bytes
        try:
            await self._turn.acquire()
        except BaseException:
            self._num_bytes -= num_bytes
            raise
        encoding = asyncio.get_running_loop().run_in_executor(None, work)
        encoding.add_done_callback(lambda _: self._leave(num_bytes))
        return await asyncio.shield(encoding)

    def _leave(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._turn.release()
