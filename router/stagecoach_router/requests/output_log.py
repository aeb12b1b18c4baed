"""All of a request's output deltas, in the order in which they came, in a tenth of the memory that the objects take.

They are kept for as long as the request is known, which may be for 100,000 tokens, with 20 log-probabilities each.
Readers that keep up find theirs as they were put; what is older is packed, and unpacked for who comes late. Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

from stagecoach_router.requests.completion import FinishReason, OutputDelta
from stagecoach_router.sampling.outputs import Sampled

# Deltas that are packed together. So many, and fewer than twice as many, are there as objects.
BLOCK_DELTAS = 256
# Packed in place of a token's id where there is no token, or one of the likeliest fewer. At most one delta of each
# completion is such an end.
_NO_TOKEN = 2**32 - 1
_NO_SAMPLED = Sampled(_NO_TOKEN, None, ())
_NO_PAIR = (_NO_TOKEN, 0.0)


class OutputLog:
    """A list of deltas that only grows."""

    __slots__ = ("_blocks", "_tail")

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._tail: list[OutputDelta] = []

    def __len__(self) -> int:
        return len(self._blocks) * BLOCK_DELTAS + len(self._tail)

    def append(self, delta: OutputDelta) -> None:
        """Adds one. Its index is below 256."""
        self._tail.append(delta)
        if len(self._tail) == 2 * BLOCK_DELTAS:
            self._blocks.append(_Block(self._tail[:BLOCK_DELTAS]))
            del self._tail[:BLOCK_DELTAS]

    def read(self, start: int, stop: int) -> list[OutputDelta]:
        """The deltas `[start, stop)`, as far as there are any."""
        num_packed = len(self._blocks) * BLOCK_DELTAS
        if start >= num_packed:
            return self._tail[start - num_packed : max(0, stop - num_packed)]
        deltas: list[OutputDelta] = []
        for number in range(start // BLOCK_DELTAS, min(len(self._blocks), -(-stop // BLOCK_DELTAS))):
            first = number * BLOCK_DELTAS
            deltas += self._blocks[number].unpack()[max(0, start - first) : max(0, stop - first)]
        return deltas + self._tail[: max(0, stop - num_packed)]


class _Block:
    __slots__ = ("_ends", "_indices", "_logprobs", "_reasons", "_text", "_token_ids", "_top_ids", "_top_logprobs")

    def __init__(self, deltas: Sequence[OutputDelta]) -> None:
        self._indices = bytes(delta.index for delta in deltas)
        tokens = [delta.sampled or _NO_SAMPLED for delta in deltas]
        self._token_ids = array("I", (sampled.token_id for sampled in tokens))
        self._text = "".join(delta.text for delta in deltas)
        self._ends = array("I", accumulate(len(delta.text) for delta in deltas))
        self._reasons = {place: delta.finish_reason for place, delta in enumerate(deltas) if delta.finish_reason}
        # Of a request's tokens all have them, or none. The likeliest are as many for each, but for tokens that cannot
        # come, which are left out.
        has_logprobs = any(sampled.logprob is not None for sampled in tokens)
        self._logprobs = array("d", (sampled.logprob or 0.0 for sampled in tokens)) if has_logprobs else None
        num_top = max(len(sampled.top) for sampled in tokens)
        top = [pair for sampled in tokens for pair in (*sampled.top, *[_NO_PAIR] * (num_top - len(sampled.top)))]
        self._top_ids = array("I", (token_id for token_id, _ in top))
        self._top_logprobs = array("d", (logprob for _, logprob in top))

    def unpack(self) -> list[OutputDelta]:
        deltas: list[OutputDelta] = []
        begin = 0
        top = list(zip(self._top_ids, self._top_logprobs, strict=True))
        num_top = len(top) // len(self._token_ids)
        for place, (index, token_id, end) in enumerate(zip(self._indices, self._token_ids, self._ends, strict=True)):
            logprob = None if self._logprobs is None else self._logprobs[place]
            sampled: Sampled | None = None
            if token_id != _NO_TOKEN:
                pairs = top[place * num_top : (place + 1) * num_top]
                if pairs and pairs[-1] == _NO_PAIR:
                    pairs = pairs[: pairs.index(_NO_PAIR)]
                sampled = Sampled(token_id, logprob, tuple(pairs))
            reason: FinishReason | None = self._reasons.get(place)
            id_or_none = None if sampled is None else token_id
            deltas.append(OutputDelta(index, self._text[begin:end], id_or_none, sampled, reason))
            begin = end
        return deltas
