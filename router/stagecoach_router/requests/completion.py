"""One completion's text: from sampled tokens to the deltas a caller gets, and when it is finished. Pure."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.text.stop_strings import StopStrings
from stagecoach_router.text.tokenizer import Tokenizer


class FinishReason(enum.Enum):
    """Why a completion ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or there is no room for more


@dataclass(slots=True)  # not frozen: one is made for every token, and freezing doubles what that costs
class OutputDelta:
    """What one token added. The text may be empty (held back) or that of several tokens.

    `sampled` is the token. None: there is none, and this is only the end of a completion.
    """

    index: int
    text: str = field(repr=False)
    token_id: int | None = field(repr=False)
    sampled: Sampled | None = field(repr=False)
    finish_reason: FinishReason | None


class Completion:
    """Turns one sequence's tokens into text, until it is finished. `params.max_tokens` has to be set.

    `prompt_tail` is the tokenizer's of the prompt.
    """

    def __init__(self, index: int, prompt_tail: Sequence[int], params: SamplingParams, tokenizer: Tokenizer) -> None:
        assert params.max_tokens is not None, "set where the request came in"
        self.index = index
        self.num_tokens = 0
        self._max_tokens = params.max_tokens
        self._stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_ids |= set(tokenizer.eos_token_ids)
        self._detokenizer = tokenizer.detokenizer(prompt_tail)
        self._stop_strings = StopStrings(params.stop) if params.stop else None

    def advance(self, sampled: Sampled) -> OutputDelta:
        """Takes the next token; returns what it adds. Neither a stop token nor a stop string is part of the text."""
        self.num_tokens += 1
        text = ""
        reason = None
        if sampled.token_id in self._stop_ids:
            reason = FinishReason.STOP
        else:
            text = self._detokenizer.feed(sampled.token_id)
            if self._stop_strings is not None:
                text, stopped = self._stop_strings.feed(text)
                if stopped:
                    return OutputDelta(self.index, text, sampled.token_id, sampled, FinishReason.STOP)
            if self.num_tokens >= self._max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            text += self._finish()
        return OutputDelta(self.index, text, sampled.token_id, sampled, reason)

    def limit(self, max_tokens: int) -> OutputDelta | None:
        """Lets it come to no more than so many tokens. Returns its end where it has that many: no token follows."""
        self._max_tokens = min(self._max_tokens, max_tokens)
        if self.num_tokens < self._max_tokens:
            return None
        return OutputDelta(self.index, self._finish(), None, None, FinishReason.LENGTH)

    def _finish(self) -> str:
        """The text that was held back: half a character, or what may have become a stop string."""
        text = self._detokenizer.flush()
        if self._stop_strings is None:
            return text
        text, stopped = self._stop_strings.feed(text)
        return text if stopped else text + self._stop_strings.flush()
