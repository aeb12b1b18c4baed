"""How one call reads a request's output: from the tokens that its caller has, up to the end or the error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stagecoach.errors import Overloaded
from stagecoach_router.requests.completion import OutputDelta
from stagecoach_router.requests.request_state import RequestState

# For each completion. A caller that reads so much slower than its answer is generated is cut off.
MAX_UNREAD_DELTAS = 4096


class OutputReader:
    """One call's place in a request's output.

    `from_tokens` says how many tokens of each completion the caller has; those are left out. What is there already can
    be read at any pace. Of what comes while it is being read, no more than MAX_UNREAD_DELTAS may wait in addition.

    A caller that has read everything is not late, however much comes then in one go, as after a journal's slow write:
    that, too, is there already.
    """

    __slots__ = ("_max_unread", "_position", "_skipped", "_state")

    def __init__(self, state: RequestState, from_tokens: Sequence[int] = ()) -> None:
        self._state = state
        self._position = 0
        self._skipped: dict[int, int] = {}  # still to be left out, by completion
        if state.request.params.n == 1:  # then the caller's tokens are the first deltas
            self._position = from_tokens[0] if from_tokens else 0
        else:
            self._skipped = {index: skipped for index, skipped in enumerate(from_tokens) if skipped}
        self._begin_to_read()

    async def read(self) -> list[OutputDelta]:
        """The deltas that have come since the last time; an empty list at the end.

        Raises the error of the request, and Overloaded where too much waits, which concerns this call only.
        """
        state = self._state
        while True:
            if self._num_unread > self._max_unread:
                text = f"the answer is not being read: {self._num_unread} tokens wait"
                raise Overloaded(text, limit=self._max_unread, value=self._num_unread)
            read = state.read_from(self._position)
            self._position += len(read)
            deltas = [delta for delta in read if not self._skips(delta)] if self._skipped else read
            if deltas:
                return deltas
            if read:  # the caller has all of them
                await asyncio.sleep(0)  # there may be many more
                continue
            if state.ended:
                return []
            await state.wait()
            self._begin_to_read()

    def _begin_to_read(self) -> None:
        self._max_unread = max(0, self._num_unread) + MAX_UNREAD_DELTAS * self._state.request.params.n

    @property
    def _num_unread(self) -> int:
        """Less than 0 where the caller has more tokens than there are: then it waits for the one after those."""
        return self._state.num_shown - self._position

    def _skips(self, delta: OutputDelta) -> bool:
        left = self._skipped.get(delta.index, 0)
        if left:
            self._skipped[delta.index] = left - 1
        return left > 0
