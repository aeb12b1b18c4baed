"""How a request and its tokens are spelt in the journal. Pure.

What is read may have been damaged, or written by somebody else: it is what it says, or InvalidArgument with the field.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from stagecoach.errors import InvalidArgument
from stagecoach.sampling_params import MAX_LOGPROBS, MAX_N, SamplingParams
from stagecoach_router.requests.request import CutShort, Request
from stagecoach_router.sampling.outputs import Sampled

_MAX_TOKEN_ID = 2**31 - 1
_MAX_PRIORITY = 2**31
_TOKENS_AT_ONCE = 4096
_OPTIONAL = {"names_limit", "cut_short"}
_PARAMS = {spec.name for spec in fields(SamplingParams)}


def write_request(request: Request) -> str:
    """The request as JSON, without its id and salt, which have columns of their own."""
    params = asdict(request.params)
    # JSON's keys are strings, and its numbers may be read as floats by others: pairs keep the ids what they are.
    params["logit_bias"] = list(request.params.logit_bias.items())
    facts = {"params": params, "priority": request.priority, "names_limit": request.names_limit}
    if request.cut_short:
        facts["cut_short"] = request.cut_short
    # In pieces, since json keeps the interpreter's lock, and the event loop waits for that: 10 ms for 131,072 tokens.
    prompt, step = request.prompt_tokens, _TOKENS_AT_ONCE
    pieces = (json.dumps(prompt[first : first + step])[1:-1] for first in range(0, len(prompt), step))
    return f'{{"prompt_tokens": [{", ".join(pieces)}], {json.dumps(facts)[1:]}'


def read_request(request_id: object, content: object, cache_salt: object) -> Request:
    """The request that `write_request` wrote, with its id and salt. Raises InvalidArgument."""
    if not isinstance(request_id, str) or not isinstance(cache_salt, bytes):
        raise InvalidArgument("request_id: not text, or a salt that is not bytes", field="request_id")
    values = _parse(content)
    if not isinstance(values, dict) or values.keys() - _OPTIONAL != {"prompt_tokens", "params", "priority"}:
        raise InvalidArgument("content: other fields than a request has", field="content")
    params, prompt_tokens, priority = values["params"], values["prompt_tokens"], values["priority"]
    if not isinstance(params, dict) or params.keys() - _PARAMS:
        raise InvalidArgument("params: other fields than they have", field="params")
    if not isinstance(prompt_tokens, list) or not all(type(each) is int for each in prompt_tokens):
        raise InvalidArgument("prompt_tokens: not token ids", field="prompt_tokens")
    if not _is_whole(priority, -_MAX_PRIORITY, _MAX_PRIORITY - 1):
        raise InvalidArgument("priority: not a whole number", field="priority")
    names_limit = values.get("names_limit", True)
    if not isinstance(names_limit, bool):
        raise InvalidArgument("names_limit: neither true nor false", field="names_limit")
    try:
        params["logit_bias"] = dict(params.get("logit_bias", ()))
    except (TypeError, ValueError) as error:
        raise InvalidArgument("logit_bias: not pairs", field="logit_bias") from error
    for name in ("stop", "stop_token_ids"):
        if isinstance(params.get(name), list):
            params[name] = tuple(params[name])
    cut_short = _read_ends(values.get("cut_short", []))
    params = SamplingParams(**params)
    return Request(request_id, tuple(prompt_tokens), params, priority, cache_salt, names_limit, cut_short)


def write_logprobs(sampled: Sampled) -> str | None:
    """The log-probabilities of a token; None where none were asked for."""
    return None if sampled.logprob is None else json.dumps([sampled.logprob, sampled.top])


def read_sampled(token_id: object, logprobs: object) -> Sampled:
    """A token with what `write_logprobs` wrote. Raises InvalidArgument."""
    if not _is_whole(token_id, 0, _MAX_TOKEN_ID):
        raise InvalidArgument("token_id: not a token's", field="token_id")
    assert isinstance(token_id, int), "just looked at"
    if logprobs is None:
        return Sampled(token_id, None, ())
    values = _parse(logprobs)
    if not isinstance(values, list) or len(values) != 2 or not isinstance(values[1], list):
        raise InvalidArgument("logprobs: not a number and a list", field="logprobs")
    logprob, top = values
    if not _is_number(logprob) or len(top) > MAX_LOGPROBS or not all(_is_likely(pair) for pair in top):
        raise InvalidArgument("logprobs: not numbers, or too many", field="logprobs")
    return Sampled(token_id, float(logprob), tuple((other, float(value)) for other, value in top))


def check_past(past: Sequence[Sequence[Sampled]], request: Request, *, vocab_size: int) -> None:
    """Raises InvalidArgument for tokens, and ends, that this request cannot have had."""
    params = request.params
    longest = max((len(tokens) for tokens in past), default=0)
    if len(past) != params.n or params.max_tokens is None or longest > params.max_tokens:
        raise InvalidArgument(
            f"tokens: {longest} of {len(past)} completions; {params.max_tokens} of {params.n} were asked for",
            field="tokens",
            limit=params.max_tokens,
            value=longest,
        )
    for end in request.cut_short:
        if request.names_limit or end.completion >= len(past) or end.num_tokens != len(past[end.completion]):
            text = f"cut_short: completion {end.completion} has ended at {end.num_tokens} tokens, which it has not"
            raise InvalidArgument(text, field="cut_short", value=end.num_tokens)
    ids = (token_id for tokens in past for sampled in tokens for token_id in (sampled.token_id, *dict(sampled.top)))
    highest = max(ids, default=0)
    if highest >= vocab_size:
        text = f"tokens: {highest} is outside the vocabulary of {vocab_size}"
        raise InvalidArgument(text, field="tokens", limit=vocab_size, value=highest)


def _read_ends(values: object) -> tuple[CutShort, ...]:
    if not isinstance(values, list) or not all(_is_end(each) for each in values):
        raise InvalidArgument("cut_short: not the ends of completions", field="cut_short")
    return tuple(CutShort(*each) for each in values)


def _is_end(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    completion, num_tokens, with_token = value
    return (
        _is_whole(completion, 0, MAX_N - 1)
        and isinstance(with_token, bool)
        and _is_whole(num_tokens, with_token, _MAX_TOKEN_ID)
    )


def _parse(text: object) -> object:
    if not isinstance(text, str):
        raise InvalidArgument("content: not text", field="content")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
        raise InvalidArgument(f"content: not JSON: {error}", field="content") from error


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold. Python also writes and reads infinite ones, unlike JSON."""
    return isinstance(value, float) or _is_whole(value, -(2**53), 2**53)


def _is_likely(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and _is_whole(pair[0], 0, _MAX_TOKEN_ID) and _is_number(pair[1])
