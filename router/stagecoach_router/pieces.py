"""The way of one request's pieces from the engine to the call that streams them.

There is one writer, who never waits, and one reader: what an asyncio.Queue does for many costs more than the piece. And
a reader that comes late gets all that waits at once, so that a slow caller costs less with every piece, not more.
"""

from __future__ import annotations

import asyncio

from stagecoach.errors import StagecoachError
from stagecoach_router.completion import Piece


class Pieces:
    """Pieces in order, and at the end perhaps an error. For use on one event loop, by one reader."""

    __slots__ = ("_error", "_reader", "_unread")

    def __init__(self) -> None:
        self._unread: list[Piece] = []
        self._error: StagecoachError | None = None
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        """How many were not read yet."""
        return len(self._unread)

    def put(self, piece: Piece) -> None:
        """Adds a piece, and wakes the reader."""
        self._unread.append(piece)
        self._wake()

    def fail(self, error: StagecoachError) -> None:
        """Ends them; what was put before is read first."""
        self._error = self._error or error
        self._wake()

    async def read(self) -> list[Piece]:
        """All that have come since the last time, at least one. Raises the error where there is nothing else."""
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        pieces, self._unread = self._unread, []
        return pieces

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
