"""Requests by the id that their callers gave them: sent twice, one is computed once.

A request is known from the moment it is accepted until it fails, is cancelled, or has been finished for a while. A call
with the id of a known one attaches to it, and reads from the token it asks for. A request runs on for `linger_s` after
the last of its calls broke.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from stagecoach import errors
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_router.durability.retention import Retention
from stagecoach_router.engine.engine import Engine
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import Request, RequestKey
from stagecoach_router.requests.request_state import Generation
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.tenants.tenants import Visit


@dataclass(eq=False, slots=True)
class Accepted:
    """A request that is known. `digest` is that of its content."""

    key: RequestKey
    digest: bytes
    generation: Generation
    linger_s: float
    visit: Visit | None = None  # what it counts as for its caller
    lapse: asyncio.TimerHandle | None = None  # ends it, as nobody reads

    def charge(self) -> None:
        """Charges its caller what has come since the last time."""
        if self.visit is not None and self.visit.is_metered:
            num_output = sum(run.completion.num_tokens for run in self.generation.runs)
            self.visit.charge_up_to(len(self.generation.request.prompt_tokens) + num_output, time.monotonic())


class Log(Protocol):
    """What outlives the process."""

    def begin(self, accepted: Accepted) -> None:
        """A request was accepted; from now on its deltas go through the log before anyone reads them."""

    def end(self, key: RequestKey) -> None:
        """It is finished, and remembered."""

    def forget(self, key: RequestKey) -> None:
        """Nobody will come for it any more."""


def content_digest(request: pb.GenerateRequest) -> bytes:
    """SHA-256 of what is asked, without how the call wants it delivered."""
    content = pb.GenerateRequest()
    content.CopyFrom(request)
    for field in ("request_id", "from_tokens", "linger_s"):
        content.ClearField(field)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


class RequestRegistry:
    """The requests that one engine runs or has finished lately. `log`, where there is one, is told of all of them."""

    def __init__(self, engine: Engine, *, max_linger_s: float, log: Log | None = None) -> None:
        self._engine = engine
        self._max_linger_s = max_linger_s
        self._log = log
        self._known: dict[RequestKey, Accepted] = {}
        self._remembered: Retention[RequestKey] = Retention()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Requests that have neither finished nor failed."""
        return self._num_running

    async def all_ended(self) -> None:
        """Returns when no request runs."""
        await self._idle.wait()

    def knows(self, key: RequestKey) -> bool:
        """Whether a request of this id is known."""
        self._forget(self._remembered.forget_old(time.monotonic()))
        return key in self._known

    def find(self, key: RequestKey, digest: bytes) -> Accepted | None:
        """The request of this id, if it is known. Raises FailedPrecondition where that is another one."""
        self._forget(self._remembered.forget_old(time.monotonic()))
        accepted = self._known.get(key)
        if accepted is not None and accepted.digest != digest:
            raise errors.FailedPrecondition(
                f"request_id: {key[1]!r} is the id of another request, with other content",
                field="request_id",
                value=key[1],
            )
        return accepted

    def accept(
        self,
        key: RequestKey,
        digest: bytes,
        request: Request,
        past: Sequence[Sequence[Sampled]] = (),
        *,
        visit: Visit | None = None,
    ) -> Accepted:
        """Begins a request, or goes on with one that has had the tokens of `past`, by completion.

        It counts as `visit` until it ends. Raises what Engine.submit raises, and then nothing was begun.
        """
        assert key not in self._known, "found before"
        if request.params.seed is None:  # so that it is the same one if it has to be computed again
            request = replace(request, params=replace(request.params, seed=secrets.randbits(64)))
        generation = self._engine.submit(request, past)
        accepted = self._known[key] = Accepted(key, digest, generation, 0.0, visit)
        if visit is not None:
            visit.keep()  # whether anyone reads it or not, as long as it runs
        self._num_running += 1
        self._idle.clear()
        if self._log is not None:
            self._log.begin(accepted)
        generation.deltas.on_end = lambda error: self._end(accepted, error)
        if generation.deltas.ended:  # in its former life
            self._end(accepted, generation.deltas.error)
        return accepted

    @contextmanager
    def reading(
        self, accepted: Accepted, *, from_tokens: Iterable[int], linger_s: float, remaining_s: float | None
    ) -> Iterator[OutputReader]:
        """A call that reads from so many tokens of each completion on, and has `remaining_s` to its deadline."""
        if accepted.lapse is not None:
            accepted.lapse.cancel()
            accepted.lapse = None
        accepted.linger_s = min(linger_s, self._max_linger_s)
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        self._engine.set_deadline(accepted.generation, deadline_s)
        reader = accepted.generation.deltas.reader(from_tokens)
        try:
            yield reader
        finally:
            reader.close()
            if not accepted.generation.deltas.num_readers:
                self.linger(accepted, accepted.linger_s)

    def linger(self, accepted: Accepted, linger_s: float) -> None:
        """Nobody reads: ends the request, if nobody comes for so long."""
        if accepted.generation.deltas.ended:
            return
        if linger_s > 0:
            accepted.lapse = asyncio.get_running_loop().call_later(linger_s, self._give_up, accepted)
        else:
            self._give_up(accepted)

    def cancel(self, key: RequestKey) -> None:
        """Ends a request, whoever reads it; harmless for one that is not known or has ended."""
        accepted = self._known.get(key)
        if accepted is not None and not accepted.generation.deltas.ended:
            self._give_up(accepted)

    def close(self) -> None:
        """The router stops: what has not ended, ends, also what is finished and waits for the log."""
        for accepted in list(self._known.values()):
            accepted.generation.deltas.fail(errors.Unavailable("the router is stopping"))

    def _give_up(self, accepted: Accepted) -> None:
        self._engine.cancel(accepted.generation)
        accepted.generation.deltas.fail(errors.Cancelled("the request was cancelled"))

    def _end(self, accepted: Accepted, error: errors.StagecoachError | None) -> None:
        if accepted.lapse is not None:
            accepted.lapse.cancel()
            accepted.lapse = None
        if accepted.visit is not None:
            accepted.charge()
            accepted.visit.end()
        self._num_running -= 1
        if not self._num_running:
            self._idle.set()
        if error is not None:
            self._forget([accepted.key])
            return
        if self._log is not None:
            self._log.end(accepted.key)
        self._forget(self._remembered.add(accepted.key, _cost(accepted.generation), time.monotonic()))

    def _forget(self, keys: Iterable[RequestKey]) -> None:
        for key in keys:
            accepted = self._known.pop(key, None)
            if accepted is not None and self._log is not None:
                self._log.forget(accepted.key)


def _cost(generation: Generation) -> int:
    """Tokens that are kept with a finished request; a log-probability counts as one."""
    params = generation.request.params
    tokens_each = 1 if params.logprobs is None else 2 + params.logprobs
    num_tokens = sum(run.completion.num_tokens for run in generation.runs)
    return len(generation.request.prompt_tokens) + num_tokens * tokens_each
