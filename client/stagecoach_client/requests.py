"""From a caller's arguments to the message that is sent. Pure. What can be checked without the server is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.channel import MAX_PUBLIC_MESSAGE_BYTES
from stagecoach.sampling_params import SAMPLING_FIELDS, SamplingParams
from stagecoach.v1.inference_pb2 import ChatMessage, ChatMessages, GenerateRequest, TokenIds, TokenizeRequest
from stagecoach.v1.inference_pb2 import SamplingParams as SamplingParamsProto

MAX_REQUEST_ID_LENGTH = 128
MAX_CACHE_SALT_LENGTH = 128
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


class Message(TypedDict):
    """One message of a conversation."""

    role: str  # one that the checkpoint's chat template knows, as a rule system, user or assistant
    content: str


# A conversation. Plain dicts of strings do as well.
Messages = Sequence[Message] | Sequence[Mapping[str, str]]


class GenerateOptions(TypedDict, total=False):
    """What `generate` takes besides `prompt` and `stream`. None is the same as leaving an option out.

    Client.generate says what each of them does.
    """

    token_ids: Sequence[int] | None
    messages: Messages | None
    model: str | None
    request_id: str | None
    priority: int | None
    cache_salt: str | None
    linger_s: float | None
    timeout_s: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    n: int | None


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One generation, checked and ready to be sent."""

    request: GenerateRequest = field(repr=False)
    num_completions: int
    timeout_s: float | None  # None: the client's


def generate_call(prompt: str | None, options: GenerateOptions) -> GenerateCall:
    """Checks the arguments of `generate`.

    Raises InvalidArgument with the field and the limit, and TypeError for an argument that does not exist.
    """
    unknown = sorted(options.keys() - GenerateOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    given = {name: value for name, value in options.items() if value is not None}
    request = GenerateRequest(model=_string("model", given.get("model", "")))
    _set_input(request, prompt, options.get("token_ids"), options.get("messages"))
    sampling = sampling_params(given)
    request.sampling.CopyFrom(sampling_to_proto(sampling))
    request.request_id = _string("request_id", given.get("request_id", ""), max_length=MAX_REQUEST_ID_LENGTH)
    request.priority = _priority(given.get("priority", 0))
    request.cache_salt = _string("cache_salt", given.get("cache_salt", ""), max_length=MAX_CACHE_SALT_LENGTH)
    request.linger_s = _linger(given.get("linger_s", 0.0))
    _check_size(request)
    return GenerateCall(request, sampling.n, check_timeout(options.get("timeout_s")))


def tokenize_request(prompt: str | None, messages: Messages | None, model: str) -> TokenizeRequest:
    """Checks the arguments of `tokenize`. Raises InvalidArgument with the field and the limit."""
    request = TokenizeRequest(model=_string("model", model))
    _set_input(request, prompt, None, messages)
    _check_size(request)
    return request


def check_timeout(timeout_s: float | None, field: str = "timeout_s") -> float | None:
    """Returns `timeout_s` as it came. Raises InvalidArgument unless it is None or a positive number."""
    if timeout_s is None:
        return None
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not number or not (math.isfinite(timeout_s) and timeout_s > 0):
        text = f"{field} must be a positive number of seconds; got {timeout_s!r}"
        raise InvalidArgument(text, field=field, limit="> 0", value=timeout_s)
    return timeout_s


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters among `options`; `stop` may be a single string. Raises InvalidArgument."""
    chosen = {name: options[name] for name in SAMPLING_FIELDS if name in options}
    for name in ("stop", "stop_token_ids"):
        if name in chosen:
            chosen[name] = _tuple(name, chosen[name])
    if "logit_bias" in chosen and not isinstance(chosen["logit_bias"], Mapping):
        raise InvalidArgument(
            "logit_bias must map token ids to numbers", field="logit_bias", value=chosen["logit_bias"]
        )
    return SamplingParams(**chosen)


def sampling_to_proto(params: SamplingParams) -> SamplingParamsProto:
    """The sampling parameters as a message."""
    return SamplingParamsProto(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop=[_encodable("stop", text) for text in params.stop],
        stop_token_ids=params.stop_token_ids,
        ignore_eos=bool(params.ignore_eos),
        logprobs=params.logprobs,
        n=params.n,
    )


def _set_input(
    request: GenerateRequest | TokenizeRequest,
    prompt: str | None,
    token_ids: Sequence[int] | None,
    messages: Messages | None,
) -> None:
    inputs: dict[str, object] = {"prompt": prompt, "messages": messages}
    if isinstance(request, GenerateRequest):
        inputs["token_ids"] = token_ids
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        text = f"give exactly one of {', '.join(inputs)}; got {' and '.join(given) or 'none'}"
        raise InvalidArgument(text, field="input", limit=1, value=len(given))
    if prompt is not None:
        request.prompt = _string("prompt", prompt)
    elif messages is not None:
        request.chat.CopyFrom(_chat(messages))
    elif token_ids is not None and isinstance(request, GenerateRequest):
        request.token_ids.CopyFrom(_token_ids(token_ids))


def _chat(messages: Messages) -> ChatMessages:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidArgument("messages must be a list with at least one message", field="messages")
    chat = ChatMessages()
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"} or not message["role"]:
            text = f"{where} must have a role and a content and nothing else"  # not quoted: it is a prompt
            raise InvalidArgument(text, field=where, limit="role, content")
        role, content = _string(f"{where}.role", message["role"]), _string(f"{where}.content", message["content"])
        chat.messages.append(ChatMessage(role=role, content=content))
    return chat


def _token_ids(token_ids: Sequence[int]) -> TokenIds:
    ids = _tuple("token_ids", token_ids)
    try:
        return TokenIds(ids=ids)
    except (TypeError, ValueError) as error:
        text = f"token_ids must be whole numbers in [0, {2**32 - 1}]: {error}"
        raise InvalidArgument(text, field="token_ids", limit=f"[0, {2**32 - 1}]") from error


def _priority(priority: object) -> int:
    if not isinstance(priority, int) or isinstance(priority, bool) or not MIN_PRIORITY <= priority <= MAX_PRIORITY:
        limit = f"[{MIN_PRIORITY}, {MAX_PRIORITY}]"
        text = f"priority must be a whole number in {limit}; got {priority!r}"
        raise InvalidArgument(text, field="priority", limit=limit, value=priority)
    return priority


def _linger(linger_s: object) -> float:
    if isinstance(linger_s, int | float) and not isinstance(linger_s, bool) and 0.0 <= linger_s < math.inf:
        return float(linger_s)
    text = f"linger_s must be a number of seconds, 0 or more; got {linger_s!r}"
    raise InvalidArgument(text, field="linger_s", limit="[0, inf)", value=linger_s)


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str) and name == "stop":
        return (value,)
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        text = f"{name} must be a list; got {type(value).__name__}"  # not quoted: it may be a prompt
        raise InvalidArgument(text, field=name, value=type(value).__name__)
    return tuple(value)


def _string(name: str, value: object, max_length: int | None = None) -> str:
    if not isinstance(value, str):
        text = f"{name} must be a string; got {type(value).__name__}"
        raise InvalidArgument(text, field=name, value=type(value).__name__)
    if max_length is not None and len(value) > max_length:
        text = f"{name} has {len(value)} characters; at most {max_length}"
        raise InvalidArgument(text, field=name, limit=max_length, value=len(value))
    return _encodable(name, value)


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{name} is not valid text: a lone surrogate at character {error.start}"
        raise InvalidArgument(message, field=name, value=error.start) from error
    return text


def _check_size(request: GenerateRequest | TokenizeRequest) -> None:
    size = request.ByteSize()
    if size > MAX_PUBLIC_MESSAGE_BYTES:
        text = f"the request has {size} bytes; at most {MAX_PUBLIC_MESSAGE_BYTES}"
        raise InvalidArgument(text, field="input", limit=MAX_PUBLIC_MESSAGE_BYTES, value=size)
