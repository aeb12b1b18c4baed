"""Work on callers' texts that takes a while: one job at a time, and each caller has its share of the line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from stagecoach.errors import Overloaded
from stagecoach_router.tenants.fair_share import FairShare
from stagecoach_router.tenants.fair_turns import FairTurns

Result = TypeVar("Result")

# Of the jobs' texts together: four requests of the largest size, a few seconds of one core's work.
MAX_CHARACTERS = 16 << 20
# For one job's turn. It is long only where a tokenizer or a template makes its jobs slow.
MAX_WAIT_S = 30.0
RETRY_AFTER_S = 2.0


class SerialQueue:
    """Runs one job at a time, so that the event loop keeps a core. Of those that wait, each caller has its turns.

    A caller that goes away leaves the queue at once. If its job has begun, which nothing can stop, the next job still
    waits for its end. Only so much waits: `max_size` of `unit`. A refusal says that with what is `awaited`: so many
    "characters of text" wait "to be tokenized".
    """

    def __init__(
        self,
        awaited: str,
        unit: str = "characters of text",
        max_size: int = MAX_CHARACTERS,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._awaited = awaited
        self._unit = unit
        self._max_wait_s = max_wait_s
        self._room = FairShare(f"{unit} that may wait {awaited}", max_size)
        self._turns: FairTurns[asyncio.Future[None]] = FairTurns()
        self._has_job = False

    @property
    def size(self) -> int:
        """Of the job that runs and of those that wait."""
        return self._room.num_held

    async def run(self, caller: str, size: int, start: Callable[[], asyncio.Future[Result]]) -> Result:
        """What the job that `start` begins returns. `size` is that of what it works on, which is held until then.

        Raises what the job raises, and Overloaded where too much waits, or has waited for too long.
        """
        if self._room.num_held:
            self._room.check(caller, size, retry_after_s=RETRY_AFTER_S)
        self._room.force(caller, size)
        try:
            await self._turn(caller)
        except BaseException:
            self._room.give_back(caller, size)
            raise
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        def end(_: object = None) -> None:
            self._room.give_back(caller, size)
            self._turns.used(caller, loop.time() - began_s)
            self._pass_on()

        try:
            job = start()
        except BaseException:  # as that of an executor that has been shut down
            end()
            raise
        job.add_done_callback(end)
        return await asyncio.shield(job)

    async def _turn(self, caller: str) -> None:
        """Returns when the caller's turn has come, which then has to be passed on. Raises Overloaded."""
        if not self._has_job:
            self._has_job = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns.wait(caller, turn)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it came just when its caller went
                self._pass_on()
            else:
                self._turns.leave(caller, turn)
            if isinstance(error, TimeoutError):
                raise self._no_turn() from None
            raise

    def _pass_on(self) -> None:
        """A job has ended: the next may begin."""
        while (turn := self._turns.next()) is not None:
            if not turn.done():
                turn.set_result(None)
                return
        self._has_job = False

    def _no_turn(self) -> Overloaded:
        return Overloaded(
            f"{self.size} {self._unit} wait {self._awaited}; no turn came in {self._max_wait_s:g} s",
            limit=self._room.size,
            value=self.size,
            retry_after_s=RETRY_AFTER_S,
        )
