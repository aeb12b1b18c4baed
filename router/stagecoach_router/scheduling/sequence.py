"""One prompt and what is generated from it: the token log, and what everybody who works on it knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stagecoach.sampling_params import SamplingParams
from stagecoach_router.sampling.outputs import WHOLE_ROW, OutputWant
from stagecoach_router.sampling.penalties import TokenCounts

# So many tokens after a replay clear a sequence of the suspicion that it breaks pipelines. The first of them comes from
# its prefill and the second from a decode: what breaks on either of these is not cleared by the other.
MIN_PROGRESS_TOKENS = 2
# A sequence that was being computed at so many losses in a row may be what breaks pipelines. At one, everything is that
# happened to run.
MIN_SUSPECT_LOSSES = 2


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A prompt and one of its completions.

    The token log, prompt then output, is the durable truth: it only grows, and everything else about a running
    sequence can be computed again from it. The scheduler appends what the step loop has sampled, and `RequestState`
    what the journal had. Each other field is changed only by the code that its group names; everybody may read it.
    """

    seq_id: int  # rises in order of arrival
    prompt_tokens: tuple[int, ...] | list[int] = field(repr=False)
    params: SamplingParams = field(repr=False)
    seed: int = field(repr=False)
    index: int = 0  # which of the request's n completions
    priority: int = 0  # larger runs first
    caller: str = ""  # whose share of the waiting tokens it goes by
    # A sibling that computes the shared prompt first: this one is admitted once the leader's prompt is dispatched,
    # and then finds it in the prefix cache.
    leader: Sequence | None = field(default=None, repr=False)
    # Sequences of different salts share no blocks.
    cache_salt: bytes = field(default=b"", repr=False)
    output_tokens: list[int] = field(default_factory=list, repr=False)

    # ---- set when it is made; the counts follow the token log by themselves
    counts: TokenCounts | None = field(init=False, repr=False)  # for bias and penalties; None: there are none

    # ---- the step loop's, and its replica's when a pipeline is lost
    # What to ask the last stage for: usually, and for the next logits (more, where the usual did not do).
    want: OutputWant = field(default=WHOLE_ROW, repr=False)
    next_want: OutputWant = field(init=False, repr=False)
    num_losses: int = field(default=0, init=False, repr=False)  # pipelines lost in a row while they computed it
    num_losses_alone: int = field(default=0, init=False, repr=False)  # of these, while they computed nobody else's
    num_tokens_since_loss: int = field(default=0, init=False, repr=False)

    # ---- the scheduler's, of which the waiting queue and the running sequences are parts
    order: Any = field(default=None, init=False, repr=False)  # sorts before those that run later; None: never added
    token_limit: int = field(default=0, init=False)  # tokens, prompt and output, at which it has to be finished
    slot: int | None = field(default=None, init=False)  # None: it does not run
    num_computed: int = field(default=0, init=False)  # positions dispatched, or found in the prefix cache
    num_cached: int = field(default=0, init=False)  # positions found in the prefix cache when first admitted
    num_reused: int = field(default=0, init=False, repr=False)  # the same, when last admitted
    num_sent_blocks: int = field(default=0, init=False, repr=False)  # block table entries the shards have been told
    awaiting_token: bool = field(default=False, init=False)  # the whole log is dispatched: the next token comes first
    sampling: bool = field(default=False, init=False)  # its logits were handed out, its token is not appended yet
    incarnation: int = field(default=0, init=False)  # raised when it stops running; results of older steps are void
    removed: bool = field(default=False, init=False)

    # ---- the block manager's; the waiting queue gives a sibling its leader's digests
    block_ids: list[int] = field(default_factory=list, init=False, repr=False)  # the block table
    num_committed: int = field(default=0, init=False, repr=False)  # leading blocks that are never written again
    digests: list[bytes] = field(default_factory=list, init=False, repr=False)  # of the log's full blocks, as needed

    def __post_init__(self) -> None:
        self.next_want = self.want
        self.counts = TokenCounts(self.prompt_tokens, self.output_tokens) if self.params.shapes_logits else None

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

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what breaks pipelines: it is computed alone until it has made progress."""
        return self.num_losses >= MIN_SUSPECT_LOSSES

    def lost_pipeline(self, *, alone: bool) -> None:
        """A pipeline was lost while it computed this; `alone`: and no other request."""
        self.num_losses += 1
        self.num_losses_alone += alone
        self.num_tokens_since_loss = 0

    def got_token(self) -> None:
        """A token was sampled: the next logits are asked for as usual, and losses may be forgotten."""
        self.next_want = self.want
        if self.num_losses:
            self.num_tokens_since_loss += 1
            if self.num_tokens_since_loss >= MIN_PROGRESS_TOKENS:
                self.num_losses = self.num_losses_alone = 0
