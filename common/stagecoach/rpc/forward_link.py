"""One Forward stream, seen from the sending side: the router to the first stage, or a stage to the next.

Frames leave in the order they were given. The receiver's credits say how many may be on their way; frames beyond
them wait here, and `send` tells its caller when a frame has left, so that pressure travels upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from types import TracebackType

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.rpc.credits import MAX_CREDITS
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.v1.shard_pb2 import ForwardResponse

logger = logging.getLogger(__name__)

Call = grpc.aio.StreamStreamCall[bytes, ForwardResponse]


class ForwardLink:
    """A stream of micro-batches to one shard.

    `on_failure` is called once, with a typed error, when the stream breaks. Nothing is sent after that.
    """

    def __init__(
        self, address: str, *, on_failure: Callable[[errors.StagecoachError], None], dial: Dial = dial_plainly
    ) -> None:
        self.address = address
        self._on_failure = on_failure
        self._waiting: deque[tuple[bytes, Callable[[], None] | None]] = deque()
        self._credits = 0
        self._num_lent = 0  # credits of frames that have left, which have not come back
        self._wake = asyncio.Event()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._has_failed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._channel = dial(address)

    async def open(self, timeout_s: float) -> None:
        """Connects and waits for the first credits. Raises Unavailable."""
        call = ShardStub(self._channel).forward()
        self._tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]
        try:
            await asyncio.wait_for(asyncio.shield(self._opened), timeout_s)
        except TimeoutError:
            await self.close()
            text = f"{self.address}: no answer to Forward in {timeout_s:g} s"
            raise errors.Unavailable(text, addresses=[self.address]) from None
        except errors.StagecoachError:
            await self.close()
            raise

    def send(self, frame: bytes, on_sent: Callable[[], None] | None = None) -> None:
        """Puts a frame in line, and returns at once. `on_sent` is called when gRPC has taken it."""
        self._waiting.append((frame, on_sent))
        self._wake.set()

    async def close(self) -> None:
        """Ends the stream. Frames that still wait are dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # An ended task keeps its stack alive by its exception, and so the call: without this, its connection would stay
        # open until the garbage collector comes by.
        self._tasks.clear()
        if not self._opened.done():
            self._opened.cancel()
        await self._channel.close()

    async def __aenter__(self) -> ForwardLink:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _write(self, call: Call) -> None:
        try:
            while True:
                while self._waiting and self._credits:
                    frame, on_sent = self._waiting.popleft()
                    self._credits -= 1
                    self._num_lent += 1
                    await call.write(frame)
                    if on_sent is not None:
                        on_sent()
                self._wake.clear()
                await self._wake.wait()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why
        except Exception as unforeseen:  # without this, whoever sends would wait for ever
            logger.exception("writing to %s", self.address)
            self._fail(errors.InternalError(f"{self.address}: {unforeseen!r}", addresses=[self.address]))

    def _take_credits(self, credits: int) -> None:
        """The first ones open the window; later ones are those of frames that have moved on, and no others.

        Raises ShardFault for a number that cannot be: more would let so many frames wait for the receiver.
        """
        limit = self._num_lent if self._opened.done() else MAX_CREDITS
        if not 1 <= credits <= limit:
            text = f"{self.address}: {credits} credits in a message; at least 1, and {limit} at most"
            raise errors.ShardFault(text, field="credits", limit=limit, value=credits, addresses=[self.address])
        if self._opened.done():
            self._num_lent -= credits
        self._credits += credits

    async def _read(self, call: Call) -> None:
        error: errors.StagecoachError
        try:
            while isinstance(response := await call.read(), ForwardResponse):
                self._take_credits(response.credits)
                self._wake.set()
                if not self._opened.done():
                    self._opened.set_result(None)
            status = await call.code()
            text = f"{self.address}: the Forward stream ended ({status.name})"
            error = errors.Unavailable(text, addresses=[self.address])
        except grpc.RpcError as rpc_error:
            error = errors.from_rpc_error(rpc_error, self.address)
        except errors.ShardFault as fault:
            error = fault
        except Exception as unforeseen:  # without this, whoever sends would wait for credits for ever
            logger.exception("reading from %s", self.address)
            error = errors.InternalError(f"{self.address}: {unforeseen!r}", addresses=[self.address])
        self._fail(error)

    def _fail(self, error: errors.StagecoachError) -> None:
        """The stream has broken, as the reader or the writer has found: it is told once."""
        if self._has_failed:
            return
        self._has_failed = True
        if self._opened.done():
            self._on_failure(error)
        else:
            self._opened.set_exception(error)
