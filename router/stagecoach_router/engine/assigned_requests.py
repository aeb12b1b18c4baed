"""The requests that are assigned to one replica: who comes and goes, and how each of them ends."""

from __future__ import annotations

from typing import Any

from stagecoach import errors
from stagecoach_router.metrics.counters import Counters
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.scheduling.scheduler import Scheduler
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.scheduling.waiting_queue import token_limit


class AssignedRequests:
    """Requests with sequences that `scheduler` has. Nothing here sends a step: where it says so, that has to follow."""

    def __init__(self, scheduler: Scheduler, counters: Counters) -> None:
        self.scheduler = scheduler
        self.counters = counters
        self._requests: dict[int, RequestState] = {}  # by the seq_id of each sequence that runs or waits here

    @property
    def num_sequences(self) -> int:
        """How many sequences run or wait here."""
        return len(self._requests)

    @property
    def requests(self) -> list[RequestState]:
        """The requests that have a sequence here, first come first."""
        return list(dict.fromkeys(self._requests.values()))

    def waiting(self) -> list[RequestState]:
        """The requests none of whose sequences runs, in the order in which they would begin."""
        waiting = [each for each in self.requests if all(sequence.slot is None for sequence in each.sequences)]
        return sorted(waiting, key=_first_in_order)

    def add(self, request: RequestState, sequence: Sequence, *, was_accepted: bool = False) -> None:
        """Takes one of a request's sequences; `was_accepted`: by a former process. `dispatch` has to follow.

        Raises as Scheduler.add.
        """
        self.scheduler.add(sequence, was_accepted=was_accepted)
        self._requests[sequence.seq_id] = request

    def cancel(self, request: RequestState) -> None:
        """Ends what this replica has of a request, in whatever state that is; its blocks are free at once.

        `dispatch` has to follow.
        """
        for sequence in request.sequences:
            if self._requests.pop(sequence.seq_id, None) is not None:
                self.scheduler.remove(sequence)

    def fail(self, request: RequestState, error: errors.StagecoachError) -> None:
        """Ends a request with an error. `dispatch` has to follow."""
        self.cancel(request)
        request.fail(error)

    def fail_all(self, error: errors.StagecoachError) -> None:
        """Ends every request that runs or waits here. Nothing new is sent."""
        for request in self.requests:
            self.fail(request, error)

    def set_deadline(self, request: RequestState, deadline_s: float | None) -> None:
        """When this replica has to be finished with a request, in seconds of time.monotonic(); None: whenever."""
        for sequence in request.sequences:
            if sequence.seq_id in self._requests:
                self.scheduler.set_deadline(sequence, deadline_s)

    def expire(self, now_s: float) -> bool:
        """Fails the requests whose deadline has passed. Returns whether there were some: `dispatch` has to follow."""
        expired = self.scheduler.expire(now_s)
        for sequence in expired:
            request = self._requests.get(sequence.seq_id)
            if request is not None:  # else it went with another of its request's completions
                self.fail(request, errors.DeadlineExceeded("the deadline of the call has passed"))
        return bool(expired)

    def fits(self, request: RequestState) -> bool:
        """Whether a request that another replica has accepted can be finished here."""
        capacity = self.scheduler.blocks.capacity_tokens
        return all(sequence.removed or sequence.token_limit <= capacity for sequence in request.sequences)

    def fits_new(self, sequence: Sequence) -> bool:
        """Whether a sequence that no scheduler has seen yet can be finished here."""
        scheduler = self.scheduler
        try:
            token_limit(sequence, context_length=scheduler.context_length, capacity=scheduler.blocks.capacity_tokens)
        except errors.OutOfRange:
            return False
        return True

    def shorten(self, request: RequestState, capacity_tokens: int) -> None:
        """Has a request end where it comes to so many tokens; its completions that have come to that end now."""
        most = capacity_tokens - len(request.request.prompt_tokens)
        for sequence in request.sequences:
            if sequence.seq_id not in self._requests:
                continue
            sequence.token_limit = min(sequence.token_limit, capacity_tokens)
            end = request.completions[sequence.index].limit(most)
            if end is not None:
                del self._requests[sequence.seq_id]
                self.scheduler.remove(sequence)
                self.counters.num_finished += 1
                request.put(end)

    def move(self, request: RequestState, other: AssignedRequests) -> None:
        """Has a request go on at another replica, from its token logs. `dispatch` has to follow, on both."""
        for sequence in request.sequences:
            if self._requests.pop(sequence.seq_id, None) is not None:
                other.scheduler.adopt(sequence, self.scheduler.release(sequence))
                other._requests[sequence.seq_id] = request


def _first_in_order(request: RequestState) -> Any:
    """The order of a request's first sequence. One that finished in a former process was never given any."""
    return min(sequence.order for sequence in request.sequences if sequence.order is not None)
