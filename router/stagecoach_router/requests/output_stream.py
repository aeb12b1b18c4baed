"""The way of one request's pieces from the engine to the calls that stream them.

There is one writer, who never waits, and readers: what an asyncio.Queue does for many costs more than the piece. A
reader that comes late gets all that waits at once, so that a slow caller costs less with every piece, not more. All
pieces are kept as long as the request is known: a caller whose connection broke comes back and reads on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from stagecoach.errors import StagecoachError
from stagecoach_router.requests.completion import Piece

# With the most log-probabilities that may be asked for, so many pieces are half a megabyte.
MAX_PIECES_READ = 256


class Pieces:
    """Pieces in order, and at the end perhaps an error. For use on one event loop.

    `tap`, where it is set, gets every piece that is put, and has to have it shown (`show`) before anyone reads it.
    `on_end` is called once: when the last completion's last piece can be read, or with the error.
    """

    __slots__ = ("_furthest", "_log", "_num_shown", "_num_unfinished", "_readers", "error", "on_end", "tap")

    def __init__(self, num_completions: int = 1) -> None:
        self.tap: Callable[[Piece], None] | None = None
        self.on_end: Callable[[StagecoachError | None], None] | None = None
        self._log: list[Piece] = []
        self._num_shown = 0
        self._num_unfinished = num_completions
        self.error: StagecoachError | None = None
        self._readers: list[PieceReader] = []
        self._furthest = 0  # that any reader has read to

    def __len__(self) -> int:
        """How many were not read yet by the reader that is furthest; none wait where nobody reads."""
        return self._num_shown - self._furthest if self._readers else 0

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    @property
    def ended(self) -> bool:
        """Whether nothing comes any more."""
        return self._num_unfinished == 0 or self.error is not None

    def put(self, piece: Piece) -> None:
        """Adds a piece, and wakes the readers."""
        self._log.append(piece)
        if self.tap is None:
            self.show(1)
        else:
            self.tap(piece)

    def show(self, num_pieces: int) -> None:
        """So many more may be read."""
        if self.ended:  # it failed while they were held back
            return
        shown = self._log[self._num_shown : self._num_shown + num_pieces]
        self._num_shown += len(shown)
        for piece in shown:
            self._num_unfinished -= piece.finish_reason is not None
        self._wake()
        if self._num_unfinished == 0:
            self._tell_end()

    def fail(self, error: StagecoachError) -> None:
        """Ends them; what could be read before is read first."""
        if not self.ended:
            self.error = error
            self._wake()
            self._tell_end()

    def reader(self, from_tokens: Iterable[int] = ()) -> PieceReader:
        """A new reader, which leaves out so many tokens of each completion. To be closed."""
        reader = PieceReader(self, {index: skipped for index, skipped in enumerate(from_tokens) if skipped})
        self._readers.append(reader)
        return reader

    def read_from(self, position: int) -> list[Piece]:
        """What can be read from there on, up to a message's worth; nothing at the end.

        Raises the error where there is nothing else.
        """
        pieces = self._log[position : min(self._num_shown, position + MAX_PIECES_READ)]
        if not pieces and self.error is not None:
            raise self.error
        self._furthest = max(self._furthest, position + len(pieces))
        return pieces

    def forget(self, reader: PieceReader) -> None:
        """The reader is gone."""
        if reader in self._readers:
            self._readers.remove(reader)

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()

    def _tell_end(self) -> None:
        if self.on_end is not None:
            self.on_end(self.error)


class PieceReader:
    """One call's place in the pieces."""

    __slots__ = ("_pieces", "_position", "_skipped", "_waiting")

    def __init__(self, pieces: Pieces, skipped: dict[int, int]) -> None:
        self._pieces = pieces
        self._position = 0
        self._skipped = skipped  # tokens to leave out yet, by completion
        self._waiting: asyncio.Future[None] | None = None

    async def read(self) -> list[Piece]:
        """What has come since the last time; an empty list at the end. Raises the error they end with."""
        while True:
            read = self._pieces.read_from(self._position)
            self._position += len(read)
            pieces = [piece for piece in read if not self._skips(piece)] if self._skipped else read
            if pieces:
                return pieces
            if read:  # all of them known to the caller
                continue
            if self._pieces.ended:
                return []
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None

    def wake(self) -> None:
        """There is something new."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Reads no more. Again is harmless."""
        self._pieces.forget(self)

    def _skips(self, piece: Piece) -> bool:
        left = self._skipped.get(piece.index, 0)
        if left:
            self._skipped[piece.index] = left - 1
        return left > 0
