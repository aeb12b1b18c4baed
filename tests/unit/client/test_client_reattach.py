"""A stream that breaks goes on where it was; when it cannot, the caller learns why it broke."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest

from stagecoach.errors import (
    Cancelled,
    FailedPrecondition,
    Overloaded,
    ShardFault,
    StagecoachError,
    Unavailable,
    connection_ended,
    to_trailing_metadata,
)
from stagecoach.rpc.channel import KEEPALIVE_INTERVAL_S, KEEPALIVE_TIMEOUT_S
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client import farewell as farewell_module
from stagecoach_client.farewell import Farewell, farewell_to
from stagecoach_client.requests import GenerateCall, generate_call
from stagecoach_client.retry import MAX_BREAK_S, MAX_REATTACH_DELAY_S, Attempts
from stagecoach_client.settings import Settings
from stagecoach_client.streams import AsyncGenerationStream, GenerationStream


class Failure(grpc.RpcError):
    """What gRPC raises for a server's error."""

    def __init__(self, error: StagecoachError) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        return self._error.code

    def details(self) -> str:
        return self._error.message

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return to_trailing_metadata(self._error)


class Lost(grpc.RpcError):
    """What gRPC raises by itself."""

    def __init__(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ()


class Call(Iterator[pb.GenerateResponse]):
    """Gives responses, then fails or ends."""

    def __init__(self, responses: list[pb.GenerateResponse], error: StagecoachError | Lost | None) -> None:
        self._responses = iter(responses)
        self._error = error

    def __next__(self) -> pb.GenerateResponse:
        for response in self._responses:
            return response
        if self._error is None:
            raise StopIteration
        raise self._error if isinstance(self._error, Lost) else Failure(self._error)

    def cancel(self) -> None:
        pass


def tokens(*token_ids: int, index: int = 0, last: bool = False) -> pb.GenerateResponse:
    reason = pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED
    return pb.GenerateResponse(request_id="r", index=index, token_ids=token_ids, finish_reason=reason)


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class CancelCall:
    """The call that tells a server to end a request."""

    is_over = False

    def add_done_callback(self, callback: Callable[[CancelCall], None]) -> None:
        self.callback = callback

    def cancelled(self) -> bool:
        return not self.is_over

    def result(self) -> None:
        self.is_over = True
        self.callback(self)

    def __await__(self) -> Iterator[None]:
        self.result()
        return iter(())


def farewell(call: GenerateCall, told: list[str]) -> Farewell | None:
    def cancel(request: pb.CancelRequest, **options: object) -> CancelCall:
        told.append(request.request_id)
        return CancelCall()

    return farewell_to(call.request, cancel, Settings(), None)


def stream_of(
    *calls: Call,
    max_retries: int = 4,
    told: list[str] | None = None,
    clock: Clock | None = None,
    **options: object,
) -> tuple[GenerationStream, list[list[int]]]:
    """A stream over `calls`, one after the other, and the from_tokens that each was begun with."""
    asked: list[list[int]] = []
    left = iter(calls)
    call: GenerateCall = generate_call("x", options)  # type: ignore[arg-type]
    clock = clock or Clock()
    attempts = Attempts(100.0, max_retries, clock=clock, dice=lambda: 0.0)

    def begin(timeout_s: float) -> Call:
        asked.append(list(call.request.from_tokens))
        return next(left)

    stream = GenerationStream(begin, call, attempts, "router:1", farewell(call, [] if told is None else told))

    def wait(timeout: float | None = None) -> bool:  # no waiting here
        clock.now_s += timeout or 0.0
        return False

    stream._closed.wait = wait  # type: ignore[method-assign]
    return stream, asked


def test_a_broken_stream_goes_on_after_the_tokens_that_came() -> None:
    stream, asked = stream_of(
        Call([tokens(1, 2), tokens(3)], Unavailable("connection lost")),
        Call([], Unavailable("connection refused")),
        Call([tokens(4)], Unavailable("connection lost")),
        Call([tokens(5, last=True)], None),
    )
    assert stream.collect().completions[0].token_ids == (1, 2, 3, 4, 5)
    assert asked == [[], [3], [3], [4]]


def test_each_completion_goes_on_where_it_was() -> None:
    stream, asked = stream_of(
        Call([tokens(1), tokens(7, 8, index=1, last=True)], Unavailable("lost")),
        Call([tokens(2, last=True)], None),
        n=2,
    )
    assert [each.token_ids for each in stream.collect().completions] == [(1, 2), (7, 8)]
    assert asked == [[], [1, 2]]


def test_every_attempt_names_the_same_request() -> None:
    given = generate_call("x", {"request_id": "mine"})
    attempts = Attempts(100.0, 4)
    GenerationStream(lambda _: Call([], None), given, attempts, "router:1")
    assert given.request.request_id == "mine"
    ids = set()
    for _ in range(2):
        call = generate_call("x", {})
        GenerationStream(lambda _: Call([], None), call, attempts, "router:1")
        ids.add(call.request.request_id)
    assert len(ids) == 2
    assert "" not in ids


@pytest.mark.parametrize("error", [ShardFault("gave up"), FailedPrecondition("no")])
def test_what_is_no_break_ends_the_stream(error: StagecoachError) -> None:
    stream, asked = stream_of(Call([tokens(1)], error))
    with pytest.raises(type(error), match=error.message):
        stream.collect()
    assert len(asked) == 1


def test_a_request_that_the_server_does_not_know_ends_with_why_the_stream_broke() -> None:
    stream, asked = stream_of(
        Call([tokens(1)], Unavailable("the pipeline is lost")),
        Call([], FailedPrecondition("request_id: not known here", field="from_tokens")),
    )
    with pytest.raises(Unavailable, match="the pipeline is lost"):
        stream.collect()
    assert len(asked) == 2


def test_without_retries_a_break_is_the_end() -> None:
    stream, asked = stream_of(Call([tokens(1)], Unavailable("connection lost")), max_retries=0)
    with pytest.raises(Unavailable, match="connection lost"):
        stream.collect()
    assert len(asked) == 1


def test_a_break_lasts_so_long_and_the_next_one_again() -> None:
    clock = Clock()
    attempts = Attempts(1000.0, 1, max_break_s=10.0, clock=clock, dice=lambda: 1.0)
    for _ in range(2):
        begun = clock.now_s
        delays_s = []
        while (delay_s := attempts.reattach_delay_s(Unavailable("lost"))) is not None:
            delays_s.append(delay_s)
            clock.now_s += delay_s
        assert delays_s[:4] == [0.05, 0.1, 0.2, 0.4]
        assert max(delays_s) == MAX_REATTACH_DELAY_S
        assert 9.0 <= clock.now_s - begun < 10.0
        attempts.has_progressed()


def test_a_break_does_not_outlast_the_deadline() -> None:
    attempts = Attempts(0.04, 1, clock=Clock(), dice=lambda: 1.0)
    assert attempts.reattach_delay_s(Unavailable("lost")) is None


@pytest.mark.parametrize(("linger_s", "times"), [(0.0, 0), (5.0, 1)])
def test_closing_a_stream_that_would_linger_tells_the_server(linger_s: float, times: int) -> None:
    told: list[str] = []
    stream, _ = stream_of(Call([tokens(1)], None), told=told, linger_s=linger_s, request_id="mine")
    next(stream)
    stream.close()
    stream.close()
    assert told == ["mine"] * times
    with pytest.raises(Cancelled):
        stream.collect()


@pytest.mark.parametrize("is_told", [False, True])
def test_what_could_not_be_told_before_is_left_for_the_programs_end(is_told: bool) -> None:
    """As when the event loop ends with the call under way."""
    stream, _ = stream_of(Call([tokens(1)], None), linger_s=5.0)
    words = stream._farewell
    assert words in farewell_module._open
    stream._cancel()
    assert words in farewell_module._open
    if is_told:
        stream.close()
    stream._ending.callback(stream._ending)
    assert (words in farewell_module._open) is not is_told
    assert words is not None
    words.done()


class RefusedCall:
    """One that the server refuses for now."""

    def __aiter__(self) -> RefusedCall:
        return self

    async def __anext__(self) -> pb.GenerateResponse:
        raise Failure(Unavailable("starting", retry_after_s=9.0))

    def cancel(self) -> None:
        pass


async def test_cancelling_the_task_that_waits_for_the_next_attempt_tells_the_server() -> None:
    told: list[str] = []
    begun: list[float] = []

    def begin(timeout_s: float) -> RefusedCall:
        begun.append(timeout_s)
        return RefusedCall()

    call = generate_call("x", {"linger_s": 60.0})
    stream = AsyncGenerationStream(begin, call, Attempts(100.0, 4), "router:1", farewell(call, told))
    reader = asyncio.create_task(anext(aiter(stream)))
    for _ in range(10):  # nothing here takes longer than a turn of the loop, but for the wait
        await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert (len(begun), len(told)) == (1, 1)
    with pytest.raises(Cancelled):
        await stream.collect()


@pytest.mark.parametrize("call", [Call([tokens(1, last=True)], None), Call([tokens(1)], ShardFault("broken"))])
def test_a_stream_that_has_ended_tells_nothing(call: Call) -> None:
    told: list[str] = []
    stream, _ = stream_of(call, told=told, linger_s=5.0)
    with contextlib.suppress(ShardFault):
        stream.collect()
    stream.close()
    assert told == []
    assert stream._farewell not in farewell_module._open


KILLED = Lost("Stream removed (Socket closed)")
REFUSED = Lost("failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:5: Connection refused")


def test_a_server_that_dies_before_the_first_token_gets_the_time_to_come_back() -> None:
    """It had the request, and may have it in its journal."""
    clock = Clock()
    done = Call([tokens(1, last=True)], None)
    stream, asked = stream_of(Call([], KILLED), *[Call([], REFUSED)] * 20, done, clock=clock)
    assert stream.collect().completions[0].token_ids == (1,)
    assert asked == [[]] * 22
    assert clock.now_s > 5


def test_a_server_that_does_not_come_back_is_given_up_in_time() -> None:
    clock = Clock()
    stream, _ = stream_of(Call([], KILLED), *[Call([], REFUSED)] * 200, clock=clock)
    with pytest.raises(Unavailable, match="Connection refused"):
        stream.collect()
    assert MAX_BREAK_S - 2 < clock.now_s <= MAX_BREAK_S


def test_the_calls_that_a_router_has_not_seen_break_are_waited_for() -> None:
    """They keep their places until its keepalive finds that their caller is gone."""
    clock = Clock()
    found_s = KEEPALIVE_INTERVAL_S + KEEPALIVE_TIMEOUT_S + 5.0
    attempts = Attempts(1000.0, 1, clock=clock, dice=lambda: 1.0)
    assert attempts.reattach_delay_s(Unavailable("connection lost")) is not None
    while clock.now_s < found_s:
        delay_s = attempts.reattach_delay_s(Overloaded("too many calls of this caller"))
        assert delay_s is not None
        clock.now_s += delay_s


def test_an_address_where_nobody_was_is_given_up_soon() -> None:
    clock = Clock()
    stream, asked = stream_of(*[Call([], REFUSED)] * 200, clock=clock)
    with pytest.raises(Unavailable, match="Connection refused"):
        stream.collect()
    assert len(asked) == 5
    assert clock.now_s < 2


@pytest.mark.parametrize(
    ("details", "ended"),
    [
        ("Stream removed (Socket closed)", True),
        ("Socket closed", True),
        ("recvmsg:Connection reset by peer", True),
        ("GOAWAY received; Error code: 0; Debug Text: server_shutdown", True),
        ("Cancelling all calls", True),
        ("failed to connect to all addresses; last error: INTERNAL: ipv4:1.2.3.4:5: Socket closed", False),
        ("DNS resolution failed for router:1", False),
        ("Received http2 header with status: 503", False),
        ("", False),
    ],
)
def test_a_lost_connection_is_told_from_one_that_never_was(details: str, ended: bool) -> None:
    assert connection_ended(Lost(details)) == ended


def test_a_full_server_is_no_answer_to_a_stream_that_broke() -> None:
    clock = Clock()
    stream, asked = stream_of(
        Call([tokens(1)], Unavailable("connection lost")),
        Call([], Overloaded("the waiting line is full", retry_after_s=3.0)),
        Call([], Overloaded("too many calls")),
        Call([tokens(2, last=True)], None),
        clock=clock,
    )
    assert stream.collect().completions[0].token_ids == (1, 2)
    assert asked == [[], [1], [1], [1]]
    assert clock.now_s >= 3.0


def test_a_full_server_is_the_end_of_a_stream_that_had_not_broken() -> None:
    stream, asked = stream_of(Call([tokens(1)], Overloaded("read too late", retry_after_s=1.0)))
    with pytest.raises(Overloaded):
        stream.collect()
    assert len(asked) == 1


def test_a_broken_stream_does_not_come_back_before_the_server_said() -> None:
    attempts = Attempts(1000.0, 1, clock=Clock(), dice=lambda: 1.0)
    assert attempts.reattach_delay_s(Unavailable("no pipeline yet", retry_after_s=4.0)) == 5.0
    assert attempts.reattach_delay_s(Unavailable("no pipeline yet", retry_after_s=20.0)) == 25.0
    assert attempts.reattach_delay_s(Unavailable("no pipeline yet", retry_after_s=MAX_BREAK_S)) is None


def test_a_server_that_only_says_the_same_again_is_given_up_in_time() -> None:
    """Each call brings a delta without a token, and breaks."""
    clock = Clock()
    stream, asked = stream_of(*(Call([tokens()], Unavailable("connection lost")) for _ in range(2000)), clock=clock)
    with pytest.raises(Unavailable, match="connection lost"):
        stream.collect()
    assert clock.now_s <= MAX_BREAK_S
    assert len(asked) < 100
