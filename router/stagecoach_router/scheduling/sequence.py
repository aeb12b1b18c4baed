"""One prompt and what is generated from it: the token log, and where the scheduler is with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stagecoach.sampling import SamplingParams


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A prompt and one of its completions.

    The token log, prompt then output, is the durable truth: it only grows, and everything else about a running
    sequence can be computed again from it. The fields below the line change at the scheduler's and the block
    manager's hands only; others may read them.
    """

    seq_id: int  # rises in order of arrival
    prompt_tokens: tuple[int, ...] | list[int] = field(repr=False)
    params: SamplingParams = field(repr=False)
    seed: int = field(repr=False)
    index: int = 0  # which of the request's n completions
    priority: int = 0  # larger runs first
    # A sibling that computes the shared prompt first: this one is admitted once the leader's prompt is dispatched,
    # and then finds it in the prefix cache.
    leader: Sequence | None = field(default=None, repr=False)
    # Sequences of different salts share no blocks.
    cache_salt: bytes = field(default=b"", repr=False)
    output_tokens: list[int] = field(default_factory=list, repr=False)

    # ---- the scheduler's
    order: Any = field(default=None, init=False, repr=False)  # sorts before those that run later; None: never added
    token_limit: int = field(default=0, init=False)  # tokens, prompt and output, at which it has to be finished
    slot: int | None = field(default=None, init=False)  # None: it does not run
    num_computed: int = field(default=0, init=False)  # positions dispatched, or found in the prefix cache
    num_cached: int = field(default=0, init=False)  # positions found in the prefix cache when first admitted
    num_sent_blocks: int = field(default=0, init=False, repr=False)  # block table entries the shards have been told
    awaiting_token: bool = field(default=False, init=False)  # the whole log is dispatched: the next token comes first
    sampling: bool = field(default=False, init=False)  # its logits were handed out, its token is not appended yet
    incarnation: int = field(default=0, init=False)  # raised when it stops running; results of older steps are void
    removed: bool = field(default=False, init=False)

    # ---- the block manager's
    block_ids: list[int] = field(default_factory=list, init=False, repr=False)  # the block table
    num_committed: int = field(default=0, init=False, repr=False)  # leading blocks that are never written again
    digests: list[bytes] = field(default_factory=list, init=False, repr=False)  # of the log's full blocks, as needed

    @property
    def num_tokens(self) -> int:
        """Length of the token log."""
        return len(self.prompt_tokens) + len(self.output_tokens)

    def token_at(self, position: int) -> int:
        """The token at a position of the log."""
        num_prompt = len(self.prompt_tokens)
        return self.prompt_tokens[position] if position < num_prompt else self.output_tokens[position - num_prompt]

    def tokens(self, start: int, end: int) -> tuple[int, ...] | list[int]:
        """Positions [start, end) of the log. Costs end - start, however long the log is."""
        num_prompt = len(self.prompt_tokens)
        if end <= num_prompt:
            return self.prompt_tokens[start:end]
        if start >= num_prompt:
            return self.output_tokens[start - num_prompt : end - num_prompt]
        return [*self.prompt_tokens[start:], *self.output_tokens[: end - num_prompt]]
