"""A request on its way: its completions, each with its sequence and everything that follows it. Knows no pipeline."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

from stagecoach_router.requests.completion import Completion
from stagecoach_router.requests.output_stream import OutputStream
from stagecoach_router.requests.request import Request
from stagecoach_router.sampling.outputs import OutputWant, Sampled
from stagecoach_router.sampling.step_sampler import Chooser
from stagecoach_router.scheduling.sequence import Sequence

# Tokens after a replay, the first of which comes from its prefill and the second from a decode: what breaks either of
# them is not cleared by the other.
MIN_PROGRESS_TOKENS = 2


class Generation:
    """One request on its way, and its deltas."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.deltas = OutputStream(request.params.n)
        self.runs: list[Run] = []

    @property
    def num_losses(self) -> int:
        """Of pipelines in a row that one of its sequences may have broken."""
        return max(run.num_losses for run in self.runs)


@dataclass(eq=False, slots=True)
class Run:
    """One completion of a request. All that is needed to go on with it elsewhere is here."""

    generation: Generation
    sequence: Sequence
    completion: Completion
    chooser: Chooser
    want: OutputWant
    retry: OutputWant | None = None  # for the next logits only: more than `want`, which did not do
    num_losses: int = 0  # of pipelines, while it was under way on them and made no progress
    num_new_tokens: int = 0  # since the last of them

    def was_under_way(self) -> int:
        """A pipeline was lost that computed it. Returns how many that makes in a row."""
        self.num_losses += 1
        self.num_new_tokens = 0
        return self.num_losses

    def got_token(self) -> None:
        """A token was sampled for it."""
        self.retry = None
        if self.num_losses:
            self.num_new_tokens += 1
            if self.num_new_tokens >= MIN_PROGRESS_TOKENS:
                self.num_losses = 0

    def replay(self, past: Many[Sampled]) -> bool:
        """Takes tokens that were sampled before. Returns whether the completion is finished with them."""
        for sampled in past:
            self.sequence.output_tokens.append(sampled.token_id)
            self.chooser.counts.add(sampled.token_id)
            delta = self.completion.advance(sampled)
            self.generation.deltas.put(delta)
            if delta.finish_reason is not None:
                return True
        return False
