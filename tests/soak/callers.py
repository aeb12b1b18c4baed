"""What callers do all day: stream, wait, leave midway, lose their connection, come back, run out of time, get it wrong.

Each kind of call is a function of a Caller, which picks what to ask. A request may be refused or fail in ways that say
that trying again can help: the router is away or stopping (Unavailable), the pipeline was lost four times while it
computed this request (ShardFault), the line is full (Overloaded). Then it is sent again with the same id, as a user
would, and has to be answered within LOST_AFTER_S all the same. Everything else is a failure of the soak.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client import AsyncClient, Generation
from stagecoach_client.requests import generate_call
from stagecoach_client.results import GenerationBuilder
from tests.soak.failure import Failed
from tests.soak.mixed_requests import MixedRequest, difference

LOST_AFTER_S = 120.0
RETRY_DELAY_S = 0.2
LINGER_S = 30.0
# Shorter than most answers take, longer than few do.
SHORT_DEADLINES_S = (0.02, 1.0)
RETRYABLE = (errors.Unavailable, errors.ShardFault, errors.Overloaded)


@dataclass
class Tally:
    """What callers saw; `ended` is by kind of call, `retries` by what the error was."""

    num_tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)


class Caller:
    """One of many, with a connection of its own."""

    def __init__(self, address: str, requests: Sequence[MixedRequest], tally: Tally, dice: random.Random) -> None:
        self._address = address
        self._requests = requests
        self._tally = tally
        self._dice = dice
        self._client = AsyncClient(address, timeout_s=LOST_AFTER_S)

    async def close(self) -> None:
        await self._client.aclose()

    async def call(self) -> None:
        """One call of some kind. Raises Failed where it did not go as it has to."""
        [(kind, _)] = self._dice.choices(KINDS, [share for _, share in KINDS])
        try:
            await kind(self, self._dice.choice(self._requests))
        except errors.StagecoachError as error:
            raise Failed(f"{kind.__name__}: {type(error).__name__}: {error}") from error
        except Failed as error:
            raise Failed(f"{kind.__name__}: {error}") from error
        self._tally.ended[kind.__name__] += 1

    async def stream(self, request: MixedRequest) -> None:
        await self._answer(request, lambda request_id: self._stream(request, request_id))

    async def wait_for_the_whole(self, request: MixedRequest) -> None:
        async def ask(request_id: str) -> Generation:
            answer = await self._client.generate(request_id=request_id, **request.options)
            self._tally.num_tokens += answer.usage.completion_tokens
            return answer

        await self._answer(request, ask)

    async def send_it_twice(self, request: MixedRequest) -> None:
        """Two calls with one id at the same time: computed once, answered twice."""
        request_id = self._new_id()
        ask = [self._answer(request, lambda name: self._stream(request, name), request_id) for _ in range(2)]
        await asyncio.gather(*ask)

    async def leave(self, request: MixedRequest) -> None:
        """Closes a stream midway, which ends the request."""
        try:
            async with await self._client.generate(stream=True, **request.options) as stream:
                for _ in range(self._dice.randint(0, 20)):
                    if await anext(stream, None) is None:
                        break
        except RETRYABLE as error:
            self._note(error)

    async def disconnect(self, request: MixedRequest) -> None:
        """The connection is gone, without a word."""
        channel = grpc.aio.insecure_channel(self._address)
        try:
            call = InferenceStub(channel).Generate(self._message(request), timeout=LOST_AFTER_S)  # type: ignore[no-untyped-call]
            for _ in range(self._dice.randint(1, 20)):
                if await call.read() is grpc.aio.EOF:
                    break
        except grpc.RpcError as failure:
            self._note(self._typed(failure, RETRYABLE))
        finally:
            await channel.close()

    async def come_back(self, request: MixedRequest) -> None:
        """Breaks a call after some tokens, and goes on from there with another one, over another connection."""

        async def ask(request_id: str) -> Generation:
            builder = GenerationBuilder(request.num_completions)
            message = self._message(request, request_id=request_id, linger_s=LINGER_S)
            ended = await self._read(builder, message, self._dice.randint(1, 30))
            while not ended:
                message.from_tokens[:] = builder.num_tokens
                ended = await self._read(builder, message, self._dice.randint(10, 200))
            return builder.build()

        await self._answer(request, ask)

    async def run_out_of_time(self, request: MixedRequest) -> None:
        timeout_s = self._dice.uniform(*SHORT_DEADLINES_S)
        try:
            answer = await self._client.generate(timeout_s=timeout_s, **request.options)
        except errors.DeadlineExceeded:
            return
        except RETRYABLE as error:  # no time was left to try again
            self._note(error)
            return
        self._check(request, answer)

    async def get_it_wrong(self, request: MixedRequest) -> None:
        """Requests that no server may take, each with the error that says so."""
        wrong: list[tuple[type[errors.StagecoachError], Callable[[pb.GenerateRequest], object]]] = [
            (errors.NotFound, lambda message: setattr(message, "model", "no-such-model")),
            (errors.InvalidArgument, lambda message: setattr(message.sampling, "temperature", -1.0)),
            (errors.InvalidArgument, lambda message: message.token_ids.ids.append(2**31 - 1)),
            (errors.InvalidArgument, lambda message: message.ClearField("prompt")),
            (errors.OutOfRange, lambda message: setattr(message.sampling, "max_tokens", 2**31 - 1)),
            (errors.FailedPrecondition, lambda message: message.from_tokens.append(3)),
        ]
        expected, spoil = self._dice.choice(wrong)
        message = self._message(request)
        spoil(message)
        try:
            await self._read(GenerationBuilder(request.num_completions), message, 1)
        except expected:
            return
        except RETRYABLE as error:
            self._note(error)
            return
        raise Failed(f"taken, where {expected.__name__} was to be said: {message}")

    async def _answer(
        self, request: MixedRequest, ask: Callable[[str], Awaitable[Generation]], request_id: str = ""
    ) -> None:
        """Asks until there is an answer, always with the same id; raises Failed for a wrong one, and for none."""
        request_id = request_id or self._new_id()
        began_s = time.monotonic()
        while True:
            try:
                self._check(request, await ask(request_id))
                return
            except RETRYABLE as error:
                if time.monotonic() - began_s > LOST_AFTER_S:
                    raise Failed(f"lost after {LOST_AFTER_S:g} s: {type(error).__name__}: {error}") from error
                self._note(error)
                await asyncio.sleep(max(RETRY_DELAY_S, error.retry_after_s))

    async def _stream(self, request: MixedRequest, request_id: str) -> Generation:
        stream = await self._client.generate(stream=True, request_id=request_id, linger_s=LINGER_S, **request.options)
        async for chunk in stream:
            self._tally.num_tokens += len(chunk.token_ids)
        return await stream.collect()

    async def _read(self, builder: GenerationBuilder, message: pb.GenerateRequest, num_responses: int) -> bool:
        """At most so many responses of a call that then breaks; whether it ended before. Raises typed errors."""
        async with grpc.aio.insecure_channel(self._address) as channel:
            call = InferenceStub(channel).Generate(message, timeout=LOST_AFTER_S)  # type: ignore[no-untyped-call]
            try:
                async for response in call:
                    builder.add(response)
                    self._tally.num_tokens += len(response.token_ids)
                    num_responses -= 1
                    if num_responses == 0:
                        return False
            except grpc.RpcError as failure:
                raise errors.from_rpc_error(failure, self._address) from failure
        return True

    def _message(self, request: MixedRequest, **delivery: Any) -> pb.GenerateRequest:
        options = dict(request.options)
        return generate_call(options.pop("prompt"), options | delivery).request  # type: ignore[typeddict-item,arg-type]

    def _check(self, request: MixedRequest, answer: Generation) -> None:
        different = difference(request.expected, answer)
        if different is not None:
            raise Failed(f"request {answer.request_id} with {dict(request.options)}: {different}")

    def _note(self, error: errors.StagecoachError) -> None:
        self._tally.retries[type(error).__name__] += 1

    def _typed(
        self, failure: grpc.RpcError, expected: tuple[type[errors.StagecoachError], ...]
    ) -> errors.StagecoachError:
        error = errors.from_rpc_error(failure, self._address)
        if not isinstance(error, expected):
            raise error from failure
        return error

    def _new_id(self) -> str:
        return f"{self._dice.getrandbits(64):016x}"


# With their shares.
KINDS: Sequence[tuple[Callable[[Caller, MixedRequest], Awaitable[None]], int]] = (
    (Caller.stream, 8),
    (Caller.wait_for_the_whole, 3),
    (Caller.send_it_twice, 1),
    (Caller.leave, 2),
    (Caller.disconnect, 2),
    (Caller.come_back, 3),
    (Caller.run_out_of_time, 2),
    (Caller.get_it_wrong, 2),
)


class Load:
    """Callers that call one thing after another, until told to pause or to stop."""

    def __init__(self, address: str, requests: Sequence[MixedRequest], num_callers: int, seed: int) -> None:
        self.tally = Tally()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._num_calling = 0
        self._all_idle = asyncio.Event()
        self._callers = [
            Caller(address, requests, self.tally, random.Random(f"{seed}/{number}")) for number in range(num_callers)
        ]
        self._tasks = [asyncio.create_task(self._call_on(caller)) for caller in self._callers]

    def check(self) -> None:
        """Raises Failed if a caller has."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def pause(self) -> None:
        """Returns when every call that runs has ended, and no other has begun."""
        self._goes_on.clear()
        if self._num_calling:
            idle = asyncio.create_task(self._all_idle.wait())
            try:
                await asyncio.wait([idle, *self._tasks], timeout=2 * LOST_AFTER_S, return_when=asyncio.FIRST_COMPLETED)
                self.check()
                if not idle.done():
                    raise Failed(f"{self._num_calling} calls have not ended after {2 * LOST_AFTER_S:g} s")
            finally:
                idle.cancel()

    def resume(self) -> None:
        self._goes_on.set()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for caller in self._callers:
            await caller.close()

    async def _call_on(self, caller: Caller) -> None:
        while True:
            await self._goes_on.wait()
            self._num_calling += 1
            self._all_idle.clear()
            try:
                await caller.call()
            finally:
                self._num_calling -= 1
                if not self._num_calling:
                    self._all_idle.set()
