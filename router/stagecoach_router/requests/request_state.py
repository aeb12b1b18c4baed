"""One accepted request: what was asked, its completions, and the stream of their output. Knows no pipeline.

The output stream has one writer, the engine, which never waits for a reader. All deltas are kept for as long as the
request is known: a caller whose connection broke comes back and reads on where it was. A reader that comes late gets
all that waits at once, so a slow caller costs less for each delta, not more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Many

from stagecoach.errors import StagecoachError
from stagecoach_router.requests.completion import Completion, FinishReason, OutputDelta
from stagecoach_router.requests.demand import Demand
from stagecoach_router.requests.output_log import OutputLog
from stagecoach_router.requests.request import CutShort, Request, RequestKey
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.tenants.caller import Caller

# With the most log-probabilities that may be asked for, so many deltas are half a megabyte.
MAX_DELTAS_READ = 256


class RequestState:
    """One request, from its acceptance until it is forgotten. For use on one event loop.

    `key` and `digest` say which request it is, `caller` is whose shares it goes by and who is charged for its tokens.
    None: nobody. `sequences` and
    `completions` belong together by index. `tap`, where it is set, is given every delta that is put, and has to call
    `show` before anyone can read it. `on_end` is called once: when the last delta of the last completion can be read,
    or with the error.
    """

    def __init__(
        self, request: Request, *, key: RequestKey | None = None, digest: bytes = b"", caller: Caller | None = None
    ) -> None:
        self.request = request
        self.key = key or ("", request.request_id)
        self.digest = digest
        self.caller_name = "" if caller is None else caller.name
        self.tenant = None if caller is None else caller.tenant
        self.sequences: list[Sequence] = []
        self.completions: list[Completion] = []
        self.demand = Demand()
        # ---- the output stream
        self.tap: Callable[[OutputDelta], None] | None = None
        self.on_end: Callable[[StagecoachError | None], None] | None = None
        self.error: StagecoachError | None = None
        self._log = OutputLog()
        self._num_shown = 0
        self._num_unfinished = request.params.n
        self._waiting: list[asyncio.Future[None]] = []  # of readers that have read everything
        self._num_charged = len(request.prompt_tokens)  # by whoever let the request in

    # ---- what has come of it

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(completion.num_tokens for completion in self.completions)

    @property
    def is_suspect(self) -> bool:
        """Whether one of its sequences may be what breaks pipelines."""
        return any(sequence.is_suspect for sequence in self.sequences)

    @property
    def num_losses_alone(self) -> int:
        """How many pipelines in a row were lost while they computed one of its sequences, and nobody else's."""
        return max(sequence.num_losses_alone for sequence in self.sequences)

    def replay(self, index: int, past: Many[Sampled], max_tokens: int | None = None) -> bool:
        """Takes a completion's tokens that a former process sampled, and charged.

        Returns whether it is finished: by its tokens, or as it may come to no more than `max_tokens` now.
        """
        sequence, completion = self.sequences[index], self.completions[index]
        if CutShort(index, len(past), with_token=True) in self.request.cut_short:
            completion.limit(len(past))
        for sampled in past:
            sequence.output_tokens.append(sampled.token_id)
            self._num_charged += 1
            delta = completion.advance(sampled)
            self.put(delta)
            if delta.finish_reason is not None:
                return True
        if CutShort(index, len(past), with_token=False) in self.request.cut_short:
            max_tokens = len(past)
        end = None if max_tokens is None else completion.limit(max_tokens)
        if end is not None:
            self.put(end)
        return end is not None

    def charge(self, now_s: float) -> None:
        """Charges the tenant for the tokens that have come since the last time."""
        if self.tenant is None or not self.tenant.is_metered:
            return
        num_tokens = len(self.request.prompt_tokens) + self.num_output_tokens
        if num_tokens > self._num_charged:
            self.tenant.charge(num_tokens - self._num_charged, now_s)
            self._num_charged = num_tokens

    # ---- the output stream

    @property
    def ended(self) -> bool:
        """Whether no further delta comes: all completions are finished, or the request has failed."""
        return self._num_unfinished == 0 or self.error is not None

    @property
    def num_shown(self) -> int:
        """How many deltas can be read, from the first one on."""
        return self._num_shown

    def put(self, delta: OutputDelta) -> None:
        """Adds a delta, and wakes the readers."""
        if delta.finish_reason is FinishReason.LENGTH and not self.request.names_limit:
            num_tokens = self.completions[delta.index].num_tokens
            if num_tokens != self.request.params.max_tokens:  # else a replay of its tokens finds that end
                self.request = self.request.with_end(CutShort(delta.index, num_tokens, delta.sampled is not None))
        self._log.append(delta)
        if self.tap is None:
            self.show(1)
        else:
            self.tap(delta)

    def show(self, num_deltas: int) -> None:
        """Lets so many more be read."""
        if self.ended:  # it failed while they were held back
            return
        shown = self._log.read(self._num_shown, self._num_shown + num_deltas)
        self._num_shown += len(shown)
        for delta in shown:
            self._num_unfinished -= delta.finish_reason is not None
        self._wake_readers()
        if self._num_unfinished == 0:
            self._tell_end()

    def fail(self, error: StagecoachError) -> None:
        """Ends the request with an error, which readers get after what they could read before."""
        if not self.ended:
            self.error = error
            self._wake_readers()
            self._tell_end()

    def read_from(self, position: int) -> list[OutputDelta]:
        """The deltas from a position on that can be read, at most a message's worth; none at the end.

        Raises the error that ended the request where there is nothing else.
        """
        deltas = self._log.read(position, min(self._num_shown, position + MAX_DELTAS_READ))
        if not deltas and self.error is not None:
            raise self.error
        return deltas

    async def wait(self) -> None:
        """Returns when more can be read, or the request has ended."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def _wake_readers(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    def _tell_end(self) -> None:
        if self.on_end is not None:
            self.on_end(self.error)
