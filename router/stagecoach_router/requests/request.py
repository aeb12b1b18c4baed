"""A request as the engine takes it, and its checks: what is wrong is found before anything is begun."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from stagecoach.errors import InvalidArgument, OutOfRange
from stagecoach.sampling_params import MAX_N, SamplingParams

# Whose request (an API key's name, or ""), and its id: one tenant's ids mean nothing to another.
RequestKey = tuple[str, str]


class CutShort(NamedTuple):
    """A completion has ended at so many tokens, as there was no room for more. Its caller has been told."""

    completion: int
    num_tokens: int
    with_token: bool  # its last token was its end; else the end came afterwards, without one


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, already in tokens, and what is wanted of it."""

    request_id: str
    prompt_tokens: tuple[int, ...] = field(repr=False)
    # max_tokens is set, and within the context length; seed is set, so that a replay draws the same numbers.
    params: SamplingParams = field(repr=False)
    priority: int = 0
    cache_salt: bytes = field(default=b"", repr=False)  # requests of different salts share no blocks
    names_limit: bool = True  # False: max_tokens is what there was room for, and it ends with less where there is less
    # Of one that names no limit: which of its completions stay ended, however much room there is later.
    cut_short: tuple[CutShort, ...] = ()

    def shortened(self, max_tokens: int) -> Request:
        """The same request with a limit of its tokens that is no higher than this."""
        assert self.params.max_tokens is not None, "set where the request came in"
        return replace(self, params=replace(self.params, max_tokens=min(self.params.max_tokens, max_tokens)))

    def with_end(self, end: CutShort) -> Request:
        """The same request, of which a completion has ended like this."""
        return replace(self, cut_short=(*(each for each in self.cut_short if each.completion != end.completion), end))


def check_prompt_length(num_tokens: int, *, context_length: int) -> None:
    """Raises OutOfRange for an empty or over-long prompt."""
    limit = context_length - 1
    if not 1 <= num_tokens <= limit:
        raise OutOfRange(
            f"prompt: {num_tokens} tokens; the context length of {context_length} has room for 1 to {limit}",
            field="prompt",
            limit=context_length,
            value=num_tokens,
        )


def check_prompt(token_ids: Sequence[int], *, vocab_size: int, context_length: int) -> None:
    """Raises OutOfRange for an empty or over-long prompt, InvalidArgument for an id outside the vocabulary."""
    check_prompt_length(len(token_ids), context_length=context_length)
    highest = max(token_ids)
    if highest >= vocab_size or min(token_ids) < 0:
        raise InvalidArgument(
            f"token_ids: {highest} is outside the vocabulary of {vocab_size}",
            field="token_ids",
            limit=vocab_size,
            value=highest,
        )


def check_delivery(from_tokens: Sequence[int], linger_s: float) -> None:
    """Checks how a call wants its answer delivered.

    Raises InvalidArgument where it has tokens of more completions than there may be, or a linger time that is no time.
    """
    if len(from_tokens) > MAX_N:
        raise InvalidArgument(
            f"from_tokens: {len(from_tokens)} completions; at most {MAX_N}",
            field="from_tokens",
            limit=MAX_N,
            value=len(from_tokens),
        )
    if not 0.0 <= linger_s < math.inf:
        raise InvalidArgument(
            f"linger_s must be a number of seconds; got {linger_s}", field="linger_s", limit="[0, inf)", value=linger_s
        )


def check_params(params: SamplingParams, *, vocab_size: int) -> None:
    """Raises InvalidArgument for token ids outside the vocabulary. SamplingParams has checked all the rest."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        highest = max(ids, default=0)
        if highest >= vocab_size:
            raise InvalidArgument(
                f"{name}: {highest} is outside the vocabulary of {vocab_size}",
                field=name,
                limit=vocab_size,
                value=highest,
            )


def resolve_params(
    params: SamplingParams, *, num_prompt_tokens: int, context_length: int, capacity: int
) -> SamplingParams:
    """The parameters with what the caller left open: max_tokens as there is room for, and a seed drawn at random.

    `capacity` is the positions that the K/V cache holds for one sequence. Raises OutOfRange where the caller asks for
    more than the context length leaves.
    """
    left = context_length - num_prompt_tokens
    seed = secrets.randbits(64) if params.seed is None else params.seed
    if params.max_tokens is None:
        return replace(params, seed=seed, max_tokens=max(1, min(left, capacity - num_prompt_tokens)))
    if params.max_tokens > left:
        raise OutOfRange(
            f"max_tokens: {params.max_tokens} after a prompt of {num_prompt_tokens} tokens; "
            f"{left} are left of the context length of {context_length}",
            field="max_tokens",
            limit=left,
            value=params.max_tokens,
        )
    return replace(params, seed=seed)
