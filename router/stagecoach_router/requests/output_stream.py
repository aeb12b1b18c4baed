"""The way of one request's deltas from the engine to the calls that stream them.

There is one writer, who never waits, and readers: what an asyncio.Queue does for many costs more than the delta. A
reader that comes late gets all that waits at once, so that a slow caller costs less with every delta, not more. All
deltas are kept as long as the request is known: a caller whose connection broke comes back and reads on where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from stagecoach.errors import StagecoachError
from stagecoach_router.requests.completion import OutputDelta

# With the most log-probabilities that may be asked for, so many deltas are half a megabyte.
MAX_DELTAS_READ = 256


class OutputStream:
    """OutputStream in order, and at the end perhaps an error. For use on one event loop.

    `tap`, where it is set, gets every delta that is put, and has to have it shown (`show`) before anyone reads it.
    `on_end` is called once: when the last completion's last delta can be read, or with the error.
    """

    __slots__ = ("_furthest", "_log", "_num_shown", "_num_unfinished", "_readers", "error", "on_end", "tap")

    def __init__(self, num_completions: int = 1) -> None:
        self.tap: Callable[[OutputDelta], None] | None = None
        self.on_end: Callable[[StagecoachError | None], None] | None = None
        self._log: list[OutputDelta] = []
        self._num_shown = 0
        self._num_unfinished = num_completions
        self.error: StagecoachError | None = None
        self._readers: list[OutputReader] = []
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

    def put(self, delta: OutputDelta) -> None:
        """Adds a delta, and wakes the readers."""
        self._log.append(delta)
        if self.tap is None:
            self.show(1)
        else:
            self.tap(delta)

    def show(self, num_deltas: int) -> None:
        """So many more may be read."""
        if self.ended:  # it failed while they were held back
            return
        shown = self._log[self._num_shown : self._num_shown + num_deltas]
        self._num_shown += len(shown)
        for delta in shown:
            self._num_unfinished -= delta.finish_reason is not None
        self._wake()
        if self._num_unfinished == 0:
            self._tell_end()

    def fail(self, error: StagecoachError) -> None:
        """Ends them; what could be read before is read first."""
        if not self.ended:
            self.error = error
            self._wake()
            self._tell_end()

    def reader(self, from_tokens: Iterable[int] = ()) -> OutputReader:
        """A new reader, which leaves out so many tokens of each completion. To be closed."""
        reader = OutputReader(self, {index: skipped for index, skipped in enumerate(from_tokens) if skipped})
        self._readers.append(reader)
        return reader

    def read_from(self, position: int) -> list[OutputDelta]:
        """What can be read from there on, up to a message's worth; nothing at the end.

        Raises the error where there is nothing else.
        """
        deltas = self._log[position : min(self._num_shown, position + MAX_DELTAS_READ)]
        if not deltas and self.error is not None:
            raise self.error
        self._furthest = max(self._furthest, position + len(deltas))
        return deltas

    def forget(self, reader: OutputReader) -> None:
        """The reader is gone."""
        if reader in self._readers:
            self._readers.remove(reader)

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()

    def _tell_end(self) -> None:
        if self.on_end is not None:
            self.on_end(self.error)


class OutputReader:
    """One call's place in the deltas."""

    __slots__ = ("_deltas", "_position", "_skipped", "_waiting")

    def __init__(self, deltas: OutputStream, skipped: dict[int, int]) -> None:
        self._deltas = deltas
        self._position = 0
        self._skipped = skipped  # tokens to leave out yet, by completion
        self._waiting: asyncio.Future[None] | None = None

    async def read(self) -> list[OutputDelta]:
        """What has come since the last time; an empty list at the end. Raises the error they end with."""
        while True:
            read = self._deltas.read_from(self._position)
            self._position += len(read)
            deltas = [delta for delta in read if not self._skips(delta)] if self._skipped else read
            if deltas:
                return deltas
            if read:  # all of them known to the caller
                continue
            if self._deltas.ended:
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
        self._deltas.forget(self)

    def _skips(self, delta: OutputDelta) -> bool:
        left = self._skipped.get(delta.index, 0)
        if left:
            self._skipped[delta.index] = left - 1
        return left > 0
