"""The blocking client against a scripted router, over real gRPC."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import stagecoach_client as sdk
from stagecoach.rpc.channel import DEFAULT_CONNECT_TIMEOUT_S
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client import Client
from stagecoach_client.settings import DEFAULT_MAX_RETRIES
from tests.integration.fake_router import FakeRouter, counting, serving, words


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    with serving(router) as address, Client(address) as client:
        yield client


def test_generate_returns_every_completion(client: Client) -> None:
    generation = client.generate("Say hello", n=2)
    assert [(c.index, c.text, c.token_ids, c.finish_reason) for c in generation.completions] == [
        (0, "Hello, world", (1, 2, 3), "length"),
        (1, "Hello, world", (1, 2, 3), "length"),
    ]
    assert generation.text == "Hello, world"
    assert generation.request_id == "r-1"
    assert generation.usage == sdk.Usage(prompt_tokens=5, cached_tokens=0, completion_tokens=6)


def test_generate_sends_what_it_was_given(client: Client, router: FakeRouter) -> None:
    client.generate(token_ids=[5, 6], temperature=0.0, stop="end", seed=3, model="tiny", request_id="mine", priority=-2)
    request = router.requests[0]
    assert list(request.token_ids.ids) == [5, 6]
    assert (request.model, request.request_id, request.priority) == ("tiny", "mine", -2)
    assert (request.sampling.temperature, list(request.sampling.stop), request.sampling.seed) == (0.0, ["end"], 3)
    assert not request.sampling.HasField("max_tokens")


def test_generate_rejects_bad_arguments_before_it_sends_them(client: Client, router: FakeRouter) -> None:
    with pytest.raises(sdk.InvalidArgument, match="top_p"):
        client.generate("x", top_p=2.0, stream=True)
    assert router.requests == []


def test_stream_gives_chunks_as_they_come_and_collects_them(client: Client) -> None:
    with client.generate("x", stream=True) as stream:
        first = next(stream)
        assert first == sdk.Chunk(0, "Hello", (1, 2), (), None, None)
        assert stream.request_id == "r-1"
        generation = stream.collect()
    assert generation.text == "Hello, world"
    assert list(stream) == []
    assert stream.collect() == generation


def test_leaving_a_stream_cancels_it_on_the_server(router: FakeRouter, client: Client) -> None:
    router.stay_open = True
    with client.generate("x", stream=True) as stream:
        next(stream)
    assert router.caller_left.wait(5)
    with pytest.raises(sdk.Cancelled):
        stream.collect()


def test_dropping_a_stream_cancels_it_on_the_server(router: FakeRouter, client: Client) -> None:
    router.stay_open = True
    for _ in client.generate("x", stream=True):
        break
    gc.collect()
    assert router.caller_left.wait(5)


def test_closing_from_another_thread_wakes_the_reader(router: FakeRouter, client: Client) -> None:
    router.answer, router.stay_open = lambda request: iter(()), True
    stream = client.generate("x", stream=True)
    closer = threading.Thread(target=lambda: router.begun.wait(5) and stream.close())
    closer.start()
    with pytest.raises(sdk.Cancelled):
        stream.collect()
    closer.join()


def test_errors_keep_their_class_and_facts(router: FakeRouter, client: Client) -> None:
    router.failures.append(sdk.OutOfRange("prompt is too long", field="prompt", limit=512, value=600))
    with pytest.raises(sdk.OutOfRange, match="too long") as caught:
        client.generate("x")
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("prompt", "512", "600")
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_status_without_detail_gets_the_class_of_its_code(router: FakeRouter, client: Client) -> None:
    router.failures.append(grpc.StatusCode.NOT_FOUND)
    with pytest.raises(sdk.NotFound, match="no detail"):
        client.tokenize("x")


@pytest.mark.parametrize("failure", [sdk.Unavailable("starting"), sdk.Overloaded("full", retry_after_s=0.1)])
def test_what_was_refused_is_tried_again(router: FakeRouter, client: Client, failure: sdk.StagecoachError) -> None:
    router.failures += [failure, failure]
    assert client.generate("x", timeout_s=5).text == "Hello, world"
    assert len(router.requests) == 3
    assert router.timeouts_s[2] < router.timeouts_s[0] - 0.1  # one deadline for all of them


def test_what_grpc_itself_refuses_for_want_of_room_is_tried_again(router: FakeRouter) -> None:
    router.stay_open = True
    with serving(router, max_calls=1) as address, Client(address) as first, Client(address, max_retries=0) as second:
        stream = first.generate("x", stream=True)
        next(stream)
        with pytest.raises(sdk.Overloaded) as caught:
            second.models()
        assert caught.value.retry_after_s > 0
        stream.close()
        assert router.caller_left.wait(5)
        assert first.models()[0].name == "tiny"


def test_a_server_that_dies_before_the_first_token_is_asked_again(router: FakeRouter) -> None:
    router.stay_open, router.answer = True, lambda request: iter(())
    with ThreadPoolExecutor(1) as threads, contextlib.ExitStack() as stack:
        with serving(router) as address:
            client = stack.enter_context(Client(address))
            answer = threads.submit(client.generate, "x", timeout_s=20)
            assert router.begun.wait(10)
        again = FakeRouter()
        with serving(again, address):
            assert answer.result(20).text == "Hello, world"
    assert router.requests[0].request_id == again.requests[0].request_id != ""


def test_retries_end(router: FakeRouter, client: Client) -> None:
    router.failures += [sdk.Unavailable("starting")] * (DEFAULT_MAX_RETRIES + 2)
    with pytest.raises(sdk.Unavailable):
        client.status()
    assert len(router.requests) == DEFAULT_MAX_RETRIES + 1


def test_a_server_that_says_when_to_come_back_is_not_asked_before(router: FakeRouter, client: Client) -> None:
    router.failures.append(sdk.Unavailable("no pipeline yet", retry_after_s=0.3))
    assert client.generate("x", timeout_s=5).text == "Hello, world"
    assert router.timeouts_s[1] < router.timeouts_s[0] - 0.25


@pytest.mark.parametrize(("method", "what"), [("generate", "stream"), ("generate", "client"), ("models", "client")])
def test_closing_from_another_thread_ends_the_wait_for_the_next_attempt(
    router: FakeRouter, client: Client, method: str, what: str
) -> None:
    router.failures.append(sdk.Unavailable("starting", retry_after_s=10.0))
    caught: list[BaseException] = []
    stream = client.generate("x", stream=True) if method == "generate" else None

    def call() -> None:
        try:
            client.models() if stream is None else next(stream)
        except sdk.StagecoachError as error:
            caught.append(error)

    caller = threading.Thread(target=call)
    began = time.monotonic()
    caller.start()
    assert router.failed.wait(10)
    caller.join(0.2)  # the failure reaches it, and it begins to wait
    assert caller.is_alive()
    (stream or client).close() if what == "stream" else client.close()
    caller.join(20)
    assert time.monotonic() - began < 9.5
    assert [type(error) for error in caught] == [sdk.Cancelled]
    assert len(router.requests) == 1


@pytest.mark.parametrize("failure", [sdk.Overloaded("full"), sdk.ShardFault("stage 1"), sdk.InternalError("bug")])
def test_other_failures_are_not_tried_again(router: FakeRouter, client: Client, failure: sdk.StagecoachError) -> None:
    router.failures.append(failure)
    with pytest.raises(type(failure)):
        client.generate("x")
    assert len(router.requests) == 1


def test_after_the_first_chunk_only_the_rest_is_asked_for(client: Client, router: FakeRouter) -> None:
    def broken(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        if request.from_tokens:
            raise sdk.FailedPrecondition("not known here", field="from_tokens")
        yield next(words(request))
        raise sdk.Unavailable("gone")

    router.answer = broken
    stream = client.generate("x", stream=True)
    assert next(stream).text == "Hello"
    with pytest.raises(sdk.Unavailable, match="gone"):
        next(stream)
    first, second = router.requests
    assert (list(first.from_tokens), list(second.from_tokens)) == ([], [2])
    assert first.request_id == second.request_id != ""
    assert list(stream) == []
    with pytest.raises(sdk.Unavailable, match="gone"):
        stream.collect()


def test_an_answer_that_stops_short_is_an_error(client: Client, router: FakeRouter) -> None:
    router.answer = lambda request: iter([pb.GenerateResponse(text="Hel", token_ids=[1])])
    with pytest.raises(sdk.InternalError, match="before the end of completion 0"):
        client.generate("x")


def test_the_deadline_ends_a_call(client: Client, router: FakeRouter) -> None:
    client.models()  # connects
    router.stay_open = True
    with pytest.raises(sdk.DeadlineExceeded):
        client.generate("x", timeout_s=0.2)
    assert router.caller_left.wait(5)


def test_long_answers_arrive_whole(client: Client, router: FakeRouter) -> None:
    router.answer = counting
    assert len(client.generate("x", max_tokens=999).completions[0].token_ids) == 999


def test_tokenize_models_and_status(client: Client, router: FakeRouter) -> None:
    messages: list[sdk.Message] = [{"role": "user", "content": "hi"}]
    assert client.tokenize(messages=messages) == sdk.Tokenization((1, 2, 3), 512)
    assert router.requests[0].chat.messages[0].content == "hi"
    assert [model.name for model in client.models()] == ["tiny"]
    status = client.status()
    assert status.ready
    assert status.num_running == 2
    stages = status.pipelines[0].stages
    assert [(s.first_layer, s.end_layer, s.dtype, s.busy_fraction) for s in stages] == [
        (0, 10, "bfloat16", 0.75),
        (10, 30, "bfloat16", 0.75),
    ]


def test_an_address_where_nobody_listens_is_unavailable_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        began = time.monotonic()
        with Client(address, max_retries=0) as client, pytest.raises(sdk.Unavailable, match=address):
            client.generate("x")
        assert time.monotonic() - began < DEFAULT_CONNECT_TIMEOUT_S


def test_an_address_that_does_not_answer_is_unavailable_after_the_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with Client(address, connect_timeout_s=0.5, max_retries=0) as client, pytest.raises(sdk.Unavailable):
            client.generate("x")
        assert 0.3 < time.monotonic() - began < 3


def test_retries_reach_a_server_that_comes_up_late() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    with Client(address, max_retries=20) as client:
        outcome: list[str] = []
        caller = threading.Thread(target=lambda: outcome.append(client.generate("x").text))
        caller.start()
        with serving(FakeRouter(), address):
            caller.join(15)
            assert outcome == ["Hello, world"]


def test_a_closed_client_says_so(client: Client) -> None:
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        client.status()


def test_a_channel_that_came_in_is_left_open(router: FakeRouter) -> None:
    with serving(router) as address, grpc.insecure_channel(address) as channel:
        with Client(channel=channel) as client:
            assert client.models()
        with Client(channel=channel) as client:
            assert client.models()


def test_closing_the_client_of_a_given_channel_ends_its_calls_alone(router: FakeRouter) -> None:
    router.stay_open = True
    with serving(router) as address, grpc.insecure_channel(address) as channel:
        client, other = Client(channel=channel), Client(channel=channel)
        with client.generate("x", stream=True) as stream, other.generate("y", stream=True) as left_alone:
            assert next(stream).text == next(left_alone).text == "Hello"
            client.close()
            with pytest.raises(sdk.Cancelled):
                stream.collect()
            assert next(left_alone).text == ", world"


@pytest.mark.parametrize(
    ("target", "name"), [({}, "the given channel: "), ({"target": "router.example:1"}, "router.example:1: ")]
)
def test_errors_of_a_given_channel_do_not_name_the_default_target(target: dict[str, str], name: str) -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        client = Client(**target, channel=channel, max_retries=0)
        for call in (client.models, lambda: client.generate("x")):
            with pytest.raises(sdk.Unavailable) as caught:
                call()
            assert caught.value.message.startswith(name)


def test_a_client_can_be_shared_between_threads(client: Client) -> None:
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate("x").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == ["Hello, world"] * 8
