"""Between the public messages and the router's own types. Protobuf goes no further than this.

What a caller sends is checked here, once; what is inside is trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from stagecoach import errors
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES
from stagecoach.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    check_length,
)
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_router.engine.engine import Engine
from stagecoach_router.frontend.large_messages import LargeMessages
from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.requests.request import (
    Request,
    check_params,
    check_prompt,
    check_prompt_length,
    resolve_params,
)
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text.prompt_encoder import PromptEncoder
from stagecoach_router.text.tokenizer import Tokenizer

MAX_CHAT_MESSAGES = 4096
MAX_REQUEST_ID_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 128
# With their texts, and counting those beside the chosen ones: a message has room for 256 bytes of each.
MAX_TOKENS_PER_RESPONSE = MAX_PUBLIC_MESSAGE_BYTES // 256
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def content_digest(request: pb.GenerateRequest) -> bytes:
    """SHA-256 of what a request asks for, which leaves out how the call wants the answer delivered."""
    content = pb.GenerateRequest()
    content.CopyFrom(request)
    for field in ("request_id", "from_tokens", "linger_s"):
        content.ClearField(field)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


async def digest_of(request: pb.GenerateRequest, large: LargeMessages, caller: Caller) -> bytes:
    """The content digest. Raises Overloaded."""
    return await large.read(content_digest, request, request.ByteSize(), caller)


async def read_request(
    request: pb.GenerateRequest,
    *,
    model: model_pb2.ModelDescription,
    encoder: PromptEncoder,
    engine: Engine,
    large: LargeMessages,
    caller: Caller,
) -> Request:
    """The request in tokens, checked against the model. Raises typed errors that name the field.

    For the tokens of a text the caller is charged, whatever comes of the request.
    """
    params = read_params(request.sampling)
    for field, limit in (("request_id", MAX_REQUEST_ID_LENGTH), ("cache_salt", MAX_CACHE_SALT_LENGTH)):
        length = len(getattr(request, field))
        if length > limit:
            raise errors.InvalidArgument(f"{field}: too long", field=field, limit=limit, value=length)
    check_params(params, vocab_size=model.vocab_size)
    if request.WhichOneof("input") == "token_ids":
        # Before anything is made of them, which takes 0.2 s for as many as a message can hold.
        check_prompt_length(len(request.token_ids.ids), context_length=model.context_length)
        prompt_tokens = await large.read(_token_ids, request.token_ids, request.ByteSize(), caller)
    else:
        prompt_tokens = tuple(await encode_text(request, encoder, large, caller))
    check_prompt(prompt_tokens, vocab_size=model.vocab_size, context_length=model.context_length)
    return Request(
        request_id=request.request_id,
        prompt_tokens=prompt_tokens,
        params=resolve_params(
            params,
            num_prompt_tokens=len(prompt_tokens),
            context_length=model.context_length,
            capacity=engine.usual_capacity_tokens(len(prompt_tokens)),
        ),
        priority=request.priority,
        cache_salt=caller.tenant.cache_salt(request.cache_salt),
        names_limit=params.max_tokens is not None,
    )


def read_params(message: pb.SamplingParams) -> SamplingParams:
    """The sampling parameters; absent fields get their defaults. Raises InvalidArgument."""

    def optional(name: str, default: Any) -> Any:
        return getattr(message, name) if message.HasField(name) else default

    # Before anything is made of them: a message may hold a million.
    check_length("logit_bias", len(message.logit_bias), MAX_LOGIT_BIAS, "entries")
    check_length("stop", len(message.stop), MAX_STOP_STRINGS, "strings")
    check_length("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
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


async def encode_text(
    request: pb.GenerateRequest | pb.TokenizeRequest, encoder: PromptEncoder, large: LargeMessages, caller: Caller
) -> list[int]:
    """The tokens of a request's prompt or messages. Raises InvalidArgument, and what the encoder raises."""
    kind = request.WhichOneof("input")
    if kind == "prompt":
        return await encoder.encode_prompt(request.prompt, caller)
    if kind == "chat":
        num_messages = len(request.chat.messages)
        if not 1 <= num_messages <= MAX_CHAT_MESSAGES:
            raise errors.InvalidArgument(
                f"messages: {num_messages}; from 1 to {MAX_CHAT_MESSAGES}",
                field="messages",
                limit=MAX_CHAT_MESSAGES,
                value=num_messages,
            )
        messages = await large.read(_messages, request.chat, request.ByteSize(), caller)
        return await encoder.encode_chat(messages, caller)
    raise errors.InvalidArgument("input: give a prompt, token_ids or messages", field="input")


def _token_ids(message: pb.TokenIds) -> tuple[int, ...]:
    return tuple(message.ids)


def _messages(chat: pb.ChatMessages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def check_answer_size(answer: pb.TokenizeResponse) -> None:
    """Raises OutOfRange for more tokens than an answer carries: a text of a message's size may have several times."""
    num_bytes = answer.ByteSize()
    if num_bytes > MAX_PUBLIC_MESSAGE_BYTES:
        raise errors.OutOfRange(
            f"input: its {len(answer.token_ids)} tokens do not fit an answer: {num_bytes} bytes",
            field="input",
            limit=MAX_PUBLIC_MESSAGE_BYTES,
            value=num_bytes,
        )


def write_deltas(deltas: Sequence[OutputDelta], state: RequestState, tokenizer: Tokenizer) -> list[pb.GenerateResponse]:
    """The next responses of a Generate stream: one for what has come of each completion, as they came.

    Where more has come than fits a message, as for a caller that comes back for a long output, there are several.
    """
    if len(deltas) == 1:  # nearly always: the reader keeps up
        return [_write_completion(deltas, state, tokenizer)]
    by_completion: dict[int, list[OutputDelta]] = {}
    for delta in deltas:
        by_completion.setdefault(delta.index, []).append(delta)
    most = max(1, MAX_TOKENS_PER_RESPONSE // (1 + (state.request.params.logprobs or 0)))
    return [
        _write_completion(each[start : start + most], state, tokenizer)
        for each in by_completion.values()
        for start in range(0, len(each), most)
    ]


def _write_completion(deltas: Sequence[OutputDelta], state: RequestState, tokenizer: Tokenizer) -> pb.GenerateResponse:
    """One response with all of `deltas`, which follow each other in one completion."""
    request, delta = state.request, deltas[-1]
    response = pb.GenerateResponse(
        request_id=request.request_id,
        index=delta.index,
        text=delta.text if len(deltas) == 1 else "".join([each.text for each in deltas]),
        token_ids=[each.token_id for each in deltas if each.token_id is not None],
    )
    for each in deltas:
        if each.sampled is not None and each.sampled.logprob is not None:
            _write_logprobs(each.sampled, each.sampled.logprob, response.logprobs.add(), tokenizer)
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
        response.usage.prompt_tokens = len(request.prompt_tokens)
        response.usage.cached_tokens = state.sequences[delta.index].num_cached
        response.usage.completion_tokens = state.completions[delta.index].num_tokens
    return response


def _write_logprobs(sampled: Sampled, logprob: float, position: pb.PositionLogprobs, tokenizer: Tokenizer) -> None:
    position.chosen.CopyFrom(_token_logprob(sampled.token_id, logprob, tokenizer))
    position.top.extend(_token_logprob(token_id, each, tokenizer) for token_id, each in sampled.top)


def _token_logprob(token_id: int, logprob: float, tokenizer: Tokenizer) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token_id, text=tokenizer.token_text(token_id), logprob=logprob)
