"""Work on callers' texts that takes a while: one job at a time, and only so much of it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from stagecoach.errors import Overloaded

Result = TypeVar("Result")

# Of the jobs' texts together: four requests of the largest size, a few seconds of one core's work.
MAX_CHARACTERS = 16 << 20
# For one job's turn. It is long only where a tokenizer or a template makes its jobs slow.
MAX_WAIT_S = 30.0
RETRY_AFTER_S = 2.0


class SerialQueue:
    """Runs one job at a time, so that the event loop keeps a core; the others wait in the order they came.

    A caller that goes away leaves the queue at once. If its job has begun, which nothing can stop, the next job still
    waits for its end. `awaited` is what the texts wait for, as a refusal says it: "to be tokenized".
    """

    def __init__(self, awaited: str, max_characters: int = MAX_CHARACTERS, max_wait_s: float = MAX_WAIT_S) -> None:
        self._awaited = awaited
        self._max_characters = max_characters
        self._max_wait_s = max_wait_s
        self._num_characters = 0
        self._turn = asyncio.Semaphore(1)

    @property
    def num_characters(self) -> int:
        """Of the job that runs and of those that wait."""
        return self._num_characters

    async def run(self, num_characters: int, start: Callable[[], asyncio.Future[Result]]) -> Result:
        """What the job that `start` begins returns. `num_characters` is the size of its text.

        Raises what the job raises, and Overloaded where too much waits, or has waited for too long.
        """
        if self._num_characters and self._num_characters + num_characters > self._max_characters:
            raise self._overloaded(f"at most {self._max_characters} may")
        self._num_characters += num_characters
        try:
            async with asyncio.timeout(self._max_wait_s):
                await self._turn.acquire()
        except BaseException as error:
            self._num_characters -= num_characters
            if isinstance(error, TimeoutError):
                raise self._overloaded(f"no turn came in {self._max_wait_s:g} s") from None
            raise
        try:
            job = start()
        except BaseException:  # as that of an executor that has been shut down
            self._leave(num_characters)
            raise
        job.add_done_callback(lambda _: self._leave(num_characters))
        return await asyncio.shield(job)

    def _overloaded(self, reason: str) -> Overloaded:
        return Overloaded(
            f"{self._num_characters} characters of text wait {self._awaited}; {reason}",
            limit=self._max_characters,
            value=self._num_characters,
            retry_after_s=RETRY_AFTER_S,
        )

    def _leave(self, num_characters: int) -> None:
        self._num_characters -= num_characters
        self._turn.release()
