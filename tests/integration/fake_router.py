"""A router for the client's tests: the public service over real gRPC, with answers that a test scripts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from stagecoach.errors import StagecoachError, to_trailing_metadata
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES, server_options
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import inference_pb2_grpc, model_pb2

Answer = Callable[[pb.GenerateRequest], Iterator[pb.GenerateResponse]]

MODEL = model_pb2.ModelDescription(
    name="tiny", family="llama", fingerprint="f00d", num_layers=30, hidden_size=8, vocab_size=100, context_length=512
)


def words(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """Every completion: "Hello" and ", world", three tokens."""
    n = request.sampling.n
    for index in range(n):
        yield pb.GenerateResponse(request_id="r-1", index=index, text="Hello", token_ids=[1, 2])
    for index in range(n):
        yield pb.GenerateResponse(
            request_id="r-1",
            index=index,
            text=", world",
            token_ids=[3],
            finish_reason=pb.FINISH_REASON_LENGTH,
            usage=pb.Usage(prompt_tokens=5, cached_tokens=index, completion_tokens=3),
        )


def saying(text: str) -> Answer:
    """`text` instead, in one delta."""

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text=text, token_ids=[1], finish_reason=pb.FINISH_REASON_STOP)

    return answer


def counting(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
    """As many tokens as max_tokens says; the first alone, the others two by two."""
    left = request.sampling.max_tokens
    size = 1
    while left:
        size = min(size, left)
        left -= size
        delta = pb.GenerateResponse(request_id="r-1", text="x" * size, token_ids=[7] * size)
        if not left:
            delta.finish_reason = pb.FINISH_REASON_LENGTH
            delta.usage.prompt_tokens = 4
        yield delta
        size = 2


def stage(start: int, end: int) -> pb.StageStatus:
    return pb.StageStatus(
        address=f"127.0.0.1:{50051 + start}",
        layers=model_pb2.LayerRange(start=start, end=end),
        device="cpu",
        dtype=model_pb2.DTYPE_BFLOAT16,
        pid=4242,
        hostname="node-a",
        weights_bytes=3 * 2**20,
        kv_cache_bytes=2**30,
        num_steps=7,
        compute_s=3.0,
        wait_s=1.0,
        num_frames=9,
        num_fast_frames=9,
    )


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    """`failures` are given, one to a call, before anything else is."""

    def __init__(self, answer: Answer = words, *, stay_open: bool = False) -> None:
        self.answer = answer
        self.stay_open = stay_open  # after the answer, until the caller goes away
        self.failures: deque[StagecoachError | grpc.StatusCode] = deque()
        self.requests: list[Any] = []
        self.cancelled: list[str] = []  # the ids of requests that a caller has ended by name
        self.metadata: list[dict[str, Any]] = []
        self.timeouts_s: list[float] = []
        self.begun = threading.Event()
        self.failed = threading.Event()
        self.caller_left = threading.Event()
        self.told = threading.Event()  # that a request is to end
        self.ready = True
        self.num_pipelines = 1
        self.status: pb.GetClusterStatusResponse | None = None  # None: an ordinary one

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self._begin(request, context, stays=self.stay_open)
        try:
            yield from self.answer(request)
        except StagecoachError as error:
            self._fail(error, context)
        self._stay()

    def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        self.cancelled.append(request.request_id)
        self.told.set()
        return pb.CancelResponse()

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._begin(request, context, stays=self.stay_open)
        self._stay()
        return pb.TokenizeResponse(token_ids=[1, 2, 3], context_length=512)

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._begin(request, context)
        return pb.ListModelsResponse(models=[MODEL])

    def GetClusterStatus(self, request: pb.GetClusterStatusRequest, context: Any) -> pb.GetClusterStatusResponse:
        self._begin(request, context)
        if self.status is not None:
            return self.status
        reason = "" if self.ready else "layers 10:20 are missing"
        pipeline = pb.PipelineStatus(
            model=MODEL, epoch=1, ready=self.ready, reason=reason, stages=[stage(0, 10), stage(10, 30)]
        )
        return pb.GetClusterStatusResponse(
            pipelines=[pipeline] * self.num_pipelines,
            num_running=2,
            num_blocks=64,
            num_free_blocks=60,
            block_size=16,
            uptime_s=12.5,
            active_s=4.0,
            looked_up_prompt_tokens=50,
            cached_prompt_tokens=10,
        )

    def _begin(self, request: Any, context: Any, *, stays: bool = False) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.timeouts_s.append(context.time_remaining())
        self.begun.set()
        if stays:  # then it is not this side that ends the call
            assert context.add_callback(self.caller_left.set)
        if self.failures:
            self._fail(self.failures.popleft(), context)

    def _fail(self, failure: StagecoachError | grpc.StatusCode, context: Any) -> None:
        self.failed.set()
        if isinstance(failure, grpc.StatusCode):
            context.abort(failure, "no detail")
        else:
            context.set_trailing_metadata(to_trailing_metadata(failure))
            context.abort(failure.code, failure.message)

    def _stay(self) -> None:
        if self.stay_open:
            self.caller_left.wait(20)


@contextmanager
def serving(router: FakeRouter, address: str = "127.0.0.1:0", *, max_calls: int | None = None) -> Iterator[str]:
    """The address at which `router` answers."""
    server = grpc.server(
        futures.ThreadPoolExecutor(16),
        options=server_options(MAX_PUBLIC_MESSAGE_BYTES),
        maximum_concurrent_rpcs=max_calls,
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(10)
