"""The public gRPC service: messages in, the engine's deltas out. Protobuf stops here."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.sampling import MAX_N, SamplingParams
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import inference_pb2_grpc, model_pb2
from stagecoach_router.durability.request_registry import RequestRegistry, content_digest
from stagecoach_router.engine.engine import Engine
from stagecoach_router.frontend.cluster_status import write_status
from stagecoach_router.frontend.write_timeouts import WriteTimeouts
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.output_stream import OutputReader
from stagecoach_router.requests.request import Request, check_delivery, check_params, check_prompt, with_max_tokens
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.scheduling.retry_after import FIRST_S
from stagecoach_router.tenants.tenants import Tenant, Tenants
from stagecoach_router.text.prompt_encoder import PromptEncoder
from stagecoach_router.text.tokenizer import Tokenizer

Context = grpc.aio.ServicerContext[Any, Any]

MAX_CHAT_MESSAGES = 4096
MAX_REQUEST_ID_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 128
# For the stages' figures of now. Where one does not answer in time, those that it sent last are shown.
LOAD_REPORT_TIMEOUT_S = 1.0
# Another router, or this one when it is back.
STOPPING_RETRY_AFTER_S = 1.0
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Serving:
    """What the service serves once the pipeline has been open: the model, its tokenizer, its engine, its requests."""

    def __init__(
        self,
        model: model_pb2.ModelDescription,
        tokenizer: Tokenizer,
        encoder: PromptEncoder,
        engine: Engine,
        accepted: RequestRegistry,
        registry: ShardRegistry,
        totals: PipelineTotals,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.engine = engine
        self.accepted = accepted
        self.registry = registry
        self.totals = totals


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Answers Unavailable until `serving` is set; `reason` says why. `callers` may change while it serves.

    While `draining`, it takes no request that is not known yet. Who takes nothing of an answer for `max_stall_s` is cut
    off.
    """

    def __init__(self, callers: Tenants, *, max_stall_s: float = math.inf) -> None:
        self._callers = callers
        self._stalled_writes = WriteTimeouts(max_stall_s)
        self.serving: Serving | None = None
        self.reason = "starting"
        self.draining = False
        self._started = time.monotonic()

    @property
    def retry_after_s(self) -> float:
        """What those were told lately whom the line had no room for; else a second."""
        return FIRST_S if self.serving is None else self.serving.engine.retry_after_s

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        try:
            caller = self._callers.identify(context.invocation_metadata())
            serving = self._require(request.model, caller)
            caller.check_priority(request.priority)
            check_delivery(request.from_tokens, request.linger_s)
            state = await self._find_or_accept(request, serving, caller)
            from_tokens, linger_s = tuple(request.from_tokens), request.linger_s
            del request  # it may be large, and the call may last
            with serving.accepted.reading(
                state, from_tokens=from_tokens, linger_s=linger_s, remaining_s=context.time_remaining()
            ) as reader:
                await self._deliver(state, reader, serving.tokenizer, context)
        except errors.StagecoachError as error:
            await abort(context, error)

    async def _deliver(self, state: RequestState, reader: OutputReader, tokenizer: Tokenizer, context: Context) -> None:
        """Sends the deltas as they come, up to the last one. Raises the error they end with."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None, "a call is a task"
        while deltas := await reader.read():
            state.charge(time.monotonic())
            for response in write_deltas(deltas, state, tokenizer):
                self._stalled_writes.begin(task, context, loop.time())
                try:
                    await context.write(response)
                finally:
                    self._stalled_writes.end(task)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        try:
            caller = self._callers.identify(context.invocation_metadata())
        except errors.StagecoachError as error:
            await abort(context, error)
        if self.serving is not None:
            self.serving.accepted.cancel((caller.name, request.request_id))
        return pb.CancelResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        try:
            caller = self._callers.identify(context.invocation_metadata())
            serving = self._require(request.model, caller)
            with caller.admit(time.monotonic()):
                token_ids = await _encode(request, serving.encoder)
        except errors.StagecoachError as error:
            await abort(context, error)
        return pb.TokenizeResponse(token_ids=token_ids, context_length=serving.model.context_length)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        try:
            caller = self._callers.identify(context.invocation_metadata())
        except errors.StagecoachError as error:
            await abort(context, error)
        served = [] if self.serving is None else [self.serving.model]
        return pb.ListModelsResponse(models=[model for model in served if caller.may_use(model.name)])

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
        await asyncio.gather(*(pipeline.refresh_loads(LOAD_REPORT_TIMEOUT_S) for pipeline in open_ones))
        return write_status(serving.model, serving.engine, serving.registry, serving.totals, uptime_s)

    async def _find_or_accept(self, request: pb.GenerateRequest, serving: Serving, caller: Tenant) -> RequestState:
        """The request of this id, where it is known, or a new one. What is refused is refused before it costs much."""
        request.request_id = request.request_id or uuid.uuid4().hex
        key = (caller.name, request.request_id)
        if serving.accepted.knows(key):
            known = serving.accepted.find(key, content_digest(request))
            if known is not None:  # else its time was up just now
                return known
        self._check_new(request, serving)
        with caller.admit(time.monotonic()):
            checked = await read_request(request, serving, caller)
            caller.charge(len(checked.prompt_tokens), time.monotonic())
            digest = content_digest(request)
            # While it was read, another call may have brought the same.
            known = serving.accepted.find(key, digest)
            return known or serving.accepted.accept(key, digest, checked, tenant=caller)

    def _check_new(self, request: pb.GenerateRequest, serving: Serving) -> None:
        """Raises Unavailable, FailedPrecondition or Overloaded where no request that is not known can be taken."""
        if self.draining:
            raise errors.Unavailable("the router is stopping", retry_after_s=STOPPING_RETRY_AFTER_S)
        if any(request.from_tokens):
            raise errors.FailedPrecondition(
                f"request_id: {request.request_id!r} is not known here, or not any more, so it cannot go on",
                field="from_tokens",
                value=request.request_id,
            )
        serving.engine.check_room(max(1, min(request.sampling.n, MAX_N)))

    def _require(self, model: str, caller: Tenant) -> Serving:
        if self.serving is None:
            raise errors.Unavailable(f"no pipeline yet: {self.reason}", retry_after_s=1.0)
        caller.check_model(model or self.serving.model.name)
        if model and model != self.serving.model.name:
            raise errors.NotFound(
                f"model: {model!r} is not served here; {self.serving.model.name!r} is",
                field="model",
                limit=self.serving.model.name,
                value=model,
            )
        return self.serving


async def read_request(request: pb.GenerateRequest, serving: Serving, caller: Tenant) -> Request:
    """The request, checked against the model. Raises typed errors that name the field."""
    params = read_params(request.sampling)
    model = serving.model
    if len(request.request_id) > MAX_REQUEST_ID_LENGTH:
        raise errors.InvalidArgument(
            "request_id: too long", field="request_id", limit=MAX_REQUEST_ID_LENGTH, value=len(request.request_id)
        )
    if len(request.cache_salt) > MAX_CACHE_SALT_LENGTH:
        raise errors.InvalidArgument(
            "cache_salt: too long", field="cache_salt", limit=MAX_CACHE_SALT_LENGTH, value=len(request.cache_salt)
        )
    check_params(params, vocab_size=model.vocab_size)
    prompt_tokens = tuple(await _encode(request, serving.encoder))
    check_prompt(prompt_tokens, vocab_size=model.vocab_size, context_length=model.context_length)
    return Request(
        request_id=request.request_id,
        prompt_tokens=prompt_tokens,
        params=with_max_tokens(
            params,
            num_prompt_tokens=len(prompt_tokens),
            context_length=model.context_length,
            capacity=serving.engine.usual_capacity_tokens(len(prompt_tokens)),
        ),
        priority=request.priority,
        cache_salt=caller.cache_salt(request.cache_salt),
    )


def read_params(message: pb.SamplingParams) -> SamplingParams:
    """The sampling parameters; absent fields get their defaults. Raises InvalidArgument."""

    def optional(name: str, default: Any) -> Any:
        return getattr(message, name) if message.HasField(name) else default

    return SamplingParams(
        temperature=optional("temperature", 1.0),
        top_k=message.top_k,
        top_p=optional("top_p", 1.0),
        min_p=message.min_p,
        repetition_penalty=optional("repetition_penalty", 1.0),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        seed=optional("seed", None),
        max_tokens=optional("max_tokens", None),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=optional("logprobs", None),
        n=optional("n", 1),
    )


async def _encode(request: pb.GenerateRequest | pb.TokenizeRequest, encoder: PromptEncoder) -> list[int]:
    kind = request.WhichOneof("input")
    if kind == "prompt":
        return await encoder.encode_prompt(request.prompt)
    if kind == "chat":
        num_messages = len(request.chat.messages)
        if not 1 <= num_messages <= MAX_CHAT_MESSAGES:
            raise errors.InvalidArgument(
                f"messages: {num_messages}; from 1 to {MAX_CHAT_MESSAGES}",
                field="messages",
                limit=MAX_CHAT_MESSAGES,
                value=num_messages,
            )
        messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
        return await encoder.encode_chat(messages)
    if isinstance(request, pb.GenerateRequest) and kind == "token_ids":
        return list(request.token_ids.ids)
    raise errors.InvalidArgument("input: give a prompt, token_ids or messages", field="input")


def write_deltas(deltas: Sequence[OutputDelta], state: RequestState, tokenizer: Tokenizer) -> list[pb.GenerateResponse]:
    """The next responses of a Generate stream: one for what has come of each completion, as they came."""
    if len(deltas) == 1:  # nearly always: the reader keeps up
        return [_write_completion(deltas, state, tokenizer)]
    by_completion: dict[int, list[OutputDelta]] = {}
    for delta in deltas:
        by_completion.setdefault(delta.index, []).append(delta)
    return [_write_completion(each, state, tokenizer) for each in by_completion.values()]


def _write_completion(deltas: Sequence[OutputDelta], state: RequestState, tokenizer: Tokenizer) -> pb.GenerateResponse:
    """One response with all of `deltas`, which follow each other in one completion."""
    request, delta = state.request, deltas[-1]
    response = pb.GenerateResponse(
        request_id=request.request_id,
        index=delta.index,
        text=delta.text if len(deltas) == 1 else "".join([each.text for each in deltas]),
        token_ids=[each.token_id for each in deltas],
    )
    if delta.sampled.logprob is not None:
        for each in deltas:
            _write_logprobs(each, response.logprobs.add(), tokenizer)
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
        response.usage.prompt_tokens = len(request.prompt_tokens)
        response.usage.cached_tokens = state.sequences[delta.index].num_cached
        response.usage.completion_tokens = state.completions[delta.index].num_tokens
    return response


def _write_logprobs(delta: OutputDelta, position: pb.PositionLogprobs, tokenizer: Tokenizer) -> None:
    assert delta.sampled.logprob is not None, "asked for with every token, or with none"
    position.chosen.CopyFrom(_token_logprob(delta.token_id, delta.sampled.logprob, tokenizer))
    position.top.extend(_token_logprob(token_id, logprob, tokenizer) for token_id, logprob in delta.sampled.top)


def _token_logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token_id, text=tokenizer.token_text(token_id), logprob=logprob)
