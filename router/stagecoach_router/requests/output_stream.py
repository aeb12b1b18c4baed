"""How one call reads a request's output: from the tokens that its caller has, up to the end or the error."""

from __future__ import annotations

from collections.abc import Iterable

from stagecoach_router.requests.completion import OutputDelta
from stagecoach_router.requests.request_state import RequestState


class OutputReader:
    """One call's place in a request's output. To be closed.

    `from_tokens` says how many tokens of each completion the caller has; those are left out.
    """

    __slots__ = ("_closed", "_position", "_skipped", "_state")

    def __init__(self, state: RequestState, from_tokens: Iterable[int] = ()) -> None:
        self._state = state
        self._position = 0
        self._skipped = {index: skipped for index, skipped in enumerate(from_tokens) if skipped}  # still to be left out
        self._closed = False
        state.num_readers += 1

    async def read(self) -> list[OutputDelta]:
        """The deltas that have come since the last time; an empty list at the end. Raises the error of the request."""
        state = self._state
        while True:
            read = state.read_from(self._position)
            self._position += len(read)
            deltas = [delta for delta in read if not self._skips(delta)] if self._skipped else read
            if deltas:
                return deltas
            if read:  # the caller has all of them
                continue
            if state.ended:
                return []
            await state.wait()

    def close(self) -> None:
        """Reads no more. Closing it again is harmless."""
        if not self._closed:
            self._closed = True
            self._state.num_readers -= 1

    def _skips(self, delta: OutputDelta) -> bool:
        left = self._skipped.get(delta.index, 0)
        if left:
            self._skipped[delta.index] = left - 1
        return left > 0
