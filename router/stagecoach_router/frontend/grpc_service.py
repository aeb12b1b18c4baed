"""The public gRPC service: who may call what, and what each call comes to. It converts nothing itself."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.process.together import together
from stagecoach.sampling_params import MAX_N
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import inference_pb2_grpc, model_pb2
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.engine.engine import Engine
from stagecoach_router.frontend.auth_interceptor import calling_tenant
from stagecoach_router.frontend.cluster_status import write_status
from stagecoach_router.frontend.convert import (
    check_answer_size,
    digest_of,
    encode_text,
    read_request,
    write_deltas,
)
from stagecoach_router.frontend.large_messages import LargeMessages
from stagecoach_router.pipelines.pipeline_manager import PipelineManager
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import check_delivery
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.scheduling.retry_after import FIRST_S
from stagecoach_router.tenants.caller import Caller, caller_of
from stagecoach_router.tenants.tenants import Tenant
from stagecoach_router.text.prompt_encoder import PromptEncoder
from stagecoach_router.text.tokenizer import Tokenizer

Context = grpc.aio.ServicerContext[Any, Any]

# For the stages' figures of now. Where one does not answer in time, those that it sent last are shown.
LOAD_REPORT_TIMEOUT_S = 1.0
# Another router, or this one when it is back.
STOPPING_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What the service serves once the first pipeline is open."""

    model: model_pb2.ModelDescription
    tokenizer: Tokenizer
    encoder: PromptEncoder
    engine: Engine
    requests: RequestRegistry
    pipelines: PipelineManager


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Answers Unavailable until `serving` is set; `reason` says why. Stands behind an AuthInterceptor and CallLimits.

    While `draining`, it takes no request that is not known yet.
    """

    def __init__(self) -> None:
        self.serving: Serving | None = None
        self.reason = "starting"
        self.draining = False
        self._large = LargeMessages()
        self.num_reading = 0  # new requests that are neither accepted nor refused yet
        self._all_read = asyncio.Event()
        self._all_read.set()
        self._started = time.monotonic()

    @property
    def retry_after_s(self) -> float:
        """When a caller that is refused for want of room may come again: what the last one was told, or a second."""
        return FIRST_S if self.serving is None else self.serving.engine.retry_after_s

    @property
    def num_places(self) -> int:
        """How many sequences may run and wait."""
        return 0 if self.serving is None else self.serving.engine.num_places

    async def all_read(self) -> None:
        """Returns when no new request is being read: while `draining`, none comes after that."""
        await self._all_read.wait()

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        try:
            tenant = calling_tenant()
            serving = self._require(request.model, tenant)
            tenant.check_priority(request.priority)
            check_delivery(request.from_tokens, request.linger_s)
            state = await self._find_or_accept(request, serving, _caller(tenant, context))
            from_tokens, linger_s = tuple(request.from_tokens), request.linger_s
            del request  # it may be large, and the call may last
            with serving.requests.reading(
                state, from_tokens=from_tokens, linger_s=linger_s, remaining_s=context.time_remaining()
            ) as reader:
                await self._deliver(state, reader, serving.tokenizer, context)
        except errors.StagecoachError as error:
            await abort(context, error)

    async def _deliver(self, state: RequestState, reader: OutputReader, tokenizer: Tokenizer, context: Context) -> None:
        """Sends the deltas as they come, up to the last one. Raises the error they end with."""
        while deltas := await reader.read():
            state.charge(time.monotonic())
            for response in write_deltas(deltas, state, tokenizer):
                await context.write(response)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        if self.serving is not None:
            self.serving.requests.cancel((calling_tenant().name, request.request_id))
        return pb.CancelResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        try:
            tenant = calling_tenant()
            serving = self._require(request.model, tenant)
            with tenant.admit(time.monotonic()):
                token_ids = await encode_text(request, serving.encoder, self._large, _caller(tenant, context))
            response = pb.TokenizeResponse(token_ids=token_ids, context_length=serving.model.context_length)
            check_answer_size(response)
        except errors.StagecoachError as error:
            await abort(context, error)
        return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        tenant, served = calling_tenant(), [] if self.serving is None else [self.serving.model]
        return pb.ListModelsResponse(models=[model for model in served if tenant.may_use(model.name)])

    async def GetClusterStatus(  # noqa: N802
        self, request: pb.GetClusterStatusRequest, context: Context
    ) -> pb.GetClusterStatusResponse:
        uptime_s = time.monotonic() - self._started
        serving = self.serving  # it may be gone when the figures are there
        if serving is None:
            return pb.GetClusterStatusResponse(
                pipelines=[pb.PipelineStatus(ready=False, reason=self.reason)], uptime_s=uptime_s
            )
        pipelines = [replica.pipeline for replica in serving.engine.replicas]
        open_ones = [pipeline for pipeline in pipelines if pipeline is not None and pipeline.lost is None]
        await together(pipeline.refresh_loads(LOAD_REPORT_TIMEOUT_S) for pipeline in open_ones)
        return write_status(serving.model, serving.engine, serving.pipelines, uptime_s)

    async def _find_or_accept(self, request: pb.GenerateRequest, serving: Serving, caller: Caller) -> RequestState:
        """The request of this id, where it is known, or a new one. What is refused is refused before it costs much."""
        tenant = caller.tenant
        request.request_id = request.request_id or uuid.uuid4().hex
        key = (tenant.name, request.request_id)
        if serving.requests.knows(key):
            tenant.admit_return(time.monotonic())
            digest = await digest_of(request, self._large, caller)
            self._check_still(serving)
            known = serving.requests.find(key, digest)
            if known is not None:  # else its time was up just now
                return known
        num_sequences = max(1, min(request.sampling.n, MAX_N))
        self._check_new(request)
        serving.requests.check_room(caller, num_sequences)
        with self._reading(), tenant.admit(time.monotonic(), num_sequences):
            checked = await read_request(
                request,
                model=serving.model,
                encoder=serving.encoder,
                engine=serving.engine,
                large=self._large,
                caller=caller,
            )
            digest = await digest_of(request, self._large, caller)
            self._check_still(serving)
            known = serving.requests.find(key, digest)
            if known is not None:  # while this one was read, another call brought the same
                return known
            state = serving.requests.accept(key, digest, checked, caller=caller)
        if request.WhichOneof("input") == "token_ids":  # a text's tokens were charged when there were some
            tenant.charge(len(checked.prompt_tokens), time.monotonic())
        return state

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self.num_reading += 1
        self._all_read.clear()
        try:
            yield
        finally:
            self.num_reading -= 1
            if not self.num_reading:
                self._all_read.set()

    def _check_still(self, serving: Serving) -> None:
        """Raises Unavailable where what was served when a call began is closed by now: it would never answer."""
        if self.serving is not serving:
            raise _stopping()

    def _check_new(self, request: pb.GenerateRequest) -> None:
        """Raises Unavailable or FailedPrecondition where no request that is not known can be taken."""
        if self.draining:
            raise _stopping()
        if any(request.from_tokens):
            raise errors.FailedPrecondition(
                f"request_id: {request.request_id!r} is not known here, or not any more, so it cannot go on",
                field="from_tokens",
                value=request.request_id,
            )

    def _require(self, model: str, tenant: Tenant) -> Serving:
        if self.serving is None:
            raise errors.Unavailable(f"no pipeline yet: {self.reason}", retry_after_s=1.0)
        tenant.check_model(model or self.serving.model.name)
        if model and model != self.serving.model.name:
            raise errors.NotFound(
                f"model: {model!r} is not served here; {self.serving.model.name!r} is",
                field="model",
                limit=self.serving.model.name,
                value=model,
            )
        return self.serving


def _stopping() -> errors.Unavailable:
    return errors.Unavailable("the router is stopping", retry_after_s=STOPPING_RETRY_AFTER_S)


def _caller(tenant: Tenant, context: Context) -> Caller:
    return Caller(caller_of(tenant, context.peer()), tenant)
