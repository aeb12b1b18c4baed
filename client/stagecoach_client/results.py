"""What a generation returns, and how it is read off the wire. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stagecoach.errors import InternalError
from stagecoach.v1 import inference_pb2 as pb

# stop: an end-of-sequence token, a stop token or a stop string came. length: max_tokens was reached, or the context is
# full. other: a reason that this version of the SDK does not know.
FinishReason = Literal["stop", "length", "other"]


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens were read and written."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose K/V was in the prefix cache
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    text: str  # the token by itself; has U+FFFD where the token is only a part of a character
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token that was chosen at one position, and the likeliest ones there."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next part of one completion. It may have one token, several, or none where only text was left to come."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]  # empty unless asked for
    finish_reason: FinishReason | None  # on the completion's last chunk
    usage: Usage | None  # on the completion's last chunk


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the request's `n` completions."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]  # one for each token, or empty unless asked for
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to one request. Its `usage` counts the prompt once, and the tokens of all completions."""

    completions: tuple[Completion, ...]
    usage: Usage
    request_id: str

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A prompt's tokens, and how many tokens fit the model's context."""

    token_ids: tuple[int, ...]
    context_length: int


@dataclass(slots=True)
class _CompletionParts:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class GenerationBuilder:
    """Reads one request's responses, and puts the chunks together to the whole answer.

    Raises InternalError for a server that breaks the contract: for a completion that nobody asked for, and for one that
    goes on after its end or never ends.
    """

    def __init__(self, num_completions: int) -> None:
        self.request_id = ""
        self._parts = [_CompletionParts() for _ in range(num_completions)]

    @property
    def num_tokens(self) -> list[int]:
        """How many tokens have come, one number for each completion."""
        return [len(parts.token_ids) for parts in self._parts]

    def add(self, response: pb.GenerateResponse) -> Chunk:
        """Takes one response, and returns it as a chunk."""
        self.request_id = self.request_id or response.request_id
        chunk = read_chunk(response)
        if chunk.index >= len(self._parts):
            raise self._broken(f"a part of completion {chunk.index}, and n is {len(self._parts)}")
        parts = self._parts[chunk.index]
        if parts.finish_reason is not None:
            raise self._broken(f"a part of completion {chunk.index} after its end")
        parts.texts.append(chunk.text)
        parts.token_ids += chunk.token_ids
        parts.logprobs += chunk.logprobs
        parts.finish_reason, parts.usage = chunk.finish_reason, chunk.usage
        return chunk

    def build(self) -> Generation:
        """The whole answer, to be called when the responses have ended."""
        completions, usages = [], []
        for index, parts in enumerate(self._parts):
            if parts.finish_reason is None:
                raise self._broken(f"the end of the stream before the end of completion {index}")
            completions.append(
                Completion(
                    index, "".join(parts.texts), tuple(parts.token_ids), tuple(parts.logprobs), parts.finish_reason
                )
            )
            usages.append(parts.usage or Usage(0, 0, len(parts.token_ids)))
        return Generation(tuple(completions), _sum(usages), self.request_id)

    def _broken(self, what: str) -> InternalError:
        name = f"request {self.request_id}: " if self.request_id else ""
        return InternalError(f"{name}the server sent {what}", field="index")


def read_chunk(response: pb.GenerateResponse) -> Chunk:
    """A GenerateResponse as a chunk."""
    return Chunk(
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(
            PositionLogprobs(_token(entry.chosen), tuple(_token(other) for other in entry.top))
            for entry in response.logprobs
        ),
        finish_reason=_finish_reason(response.finish_reason),
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def read_tokenization(response: pb.TokenizeResponse) -> Tokenization:
    """A TokenizeResponse as a value."""
    return Tokenization(tuple(response.token_ids), response.context_length)


def _finish_reason(reason: int) -> FinishReason | None:
    if reason == pb.FINISH_REASON_UNSPECIFIED:
        return None
    if reason == pb.FINISH_REASON_STOP:
        return "stop"
    return "length" if reason == pb.FINISH_REASON_LENGTH else "other"


def _token(token: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token.token_id, token.text, token.logprob)


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=max(usage.prompt_tokens for usage in usages),
        # The first completion's count is the least: the later ones also find what the first one has computed.
        cached_tokens=min(usage.cached_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )
