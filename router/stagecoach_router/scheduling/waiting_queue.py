"""Which sequences are refused, which wait, and which of those get blocks and may run. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from stagecoach.errors import OutOfRange, Overloaded
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.retry_after import RetryAfter
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.tenants.fair_share import FairShare

# Of all that wait, prompts and what they had when they were preempted; some 100 bytes each. A caller has a share.
MAX_WAITING_TOKENS = 4 * 2**20
# Admission leaves a block free for each running sequence to grow into, or else the newcomer would be preempted soon;
# but no more than this part of all blocks.
MAX_RESERVE_FRACTION = 8

by_order = attrgetter("order")


def by_priority_then_arrival(sequence: Sequence) -> tuple[int, int]:
    """The order in which sequences run: higher priority first, then first come, first served."""
    return (-sequence.priority, sequence.seq_id)


def token_limit(sequence: Sequence, *, context_length: int, capacity: int) -> int:
    """Tokens, prompt and output, that a sequence may come to. `capacity` is the positions that all blocks hold.

    Raises OutOfRange if the sequence would not fit them even if it were alone.
    """
    num_prompt = len(sequence.prompt_tokens)
    assert 0 < num_prompt < context_length, "checked where the request came in"
    if num_prompt >= capacity:
        raise OutOfRange(
            f"the prompt has {num_prompt} tokens; the K/V cache is {capacity}, and one has to be left for the output",
            field="prompt",
            limit=capacity - 1,
            value=num_prompt,
        )
    max_tokens = sequence.params.max_tokens
    if max_tokens is None:
        return min(context_length, capacity)
    limit = min(num_prompt + max_tokens, context_length)
    if limit > capacity:
        raise OutOfRange(
            f"prompt and max_tokens come to {limit} tokens; the K/V cache holds {capacity}",
            field="max_tokens",
            limit=capacity - num_prompt,
            value=max_tokens,
        )
    return limit


def give_blocks(sequence: Sequence, blocks: BlockManager, num_running: int, least_reserve: int = 0) -> bool:
    """Gives a sequence that is to run the blocks of its whole log. False, and nothing is changed: there are too few.

    `least_reserve`: at least so many stay free.
    """
    reserve = max(least_reserve, min(num_running, blocks.num_blocks // MAX_RESERVE_FRACTION))
    if not blocks.allocate(sequence, reserve=reserve):
        return False
    sequence.num_computed = sequence.num_reused = sequence.num_committed * blocks.block_size
    if sequence.incarnation == 0:
        sequence.num_cached = sequence.num_computed
    return True


class WaitingQueue:
    """Sequences that do not run, in order. Each has its `order` set."""

    def __init__(self, blocks: BlockManager, max_waiting: int) -> None:
        self._blocks = blocks
        self._max_waiting = max_waiting
        self._queue: list[Sequence] = []
        self._tokens = FairShare("tokens of sequences that wait", MAX_WAITING_TOKENS)
        self.num_left = 0  # so far, those that will be back left out; those that are replayed count as waiting, too
        self._retry_after = RetryAfter()
        # Who found too few blocks, and blocks.num_releases then: no use in trying again before that has risen.
        self._blocked: Sequence | None = None
        self._blocked_at = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    @property
    def retry_after_s(self) -> float:
        """The last estimate of when a refused caller may come again."""
        return self._retry_after.delay_s

    def num_starting(self, num_free_slots: int) -> int:
        """How many may start with the next steps, as far as is known: none where the first one lacks blocks."""
        return 0 if self._lacks_blocks() else min(len(self._queue), num_free_slots)

    def check_room(
        self,
        num_free_slots: int,
        *,
        num_sequences: int = 1,
        sequence: Sequence | None = None,
        num_ahead: int = 0,
        now_s: float | None = None,
    ) -> None:
        """Raises Overloaded if not so many more may wait, or if the tokens of `sequence` are beyond its caller's share.

        Those that wait only for the next step do not count. Where nobody else waits, tokens do not, so no prompt is
        refused for ever. `num_ahead` wait elsewhere, and go first. With the clock's reading, `retry_after_s` is an
        estimate of now, else the last one.
        """
        num_waiting = len(self._queue) + num_ahead
        num_starting = 0 if self._lacks_blocks() else num_free_slots
        if num_waiting + num_sequences > self._max_waiting + num_starting:
            raise Overloaded(
                f"{num_waiting} sequences are waiting; at most {self._max_waiting} may",
                limit=self._max_waiting,
                value=num_waiting,
                retry_after_s=self._retry_after_s(num_waiting, now_s),
            )
        if num_waiting and sequence is not None:
            retry_after_s = self._retry_after_s(num_waiting, now_s)
            self._tokens.check(sequence.caller, _own_tokens(sequence), retry_after_s=retry_after_s)

    def _retry_after_s(self, num_waiting: int, now_s: float | None) -> float:
        if now_s is None:
            return self.retry_after_s
        return self._retry_after.after_s(num_waiting, self.num_left, now_s)

    def join(self, sequence: Sequence) -> None:
        """A new sequence, or one that was preempted."""
        self.adopt(sequence)
        self.num_left -= sequence.incarnation > 0

    def adopt(self, sequence: Sequence) -> None:
        """A sequence that another queue has released."""
        insort(self._queue, sequence, key=by_order)
        self._tokens.force(sequence.caller, _own_tokens(sequence))

    def leave(self, sequence: Sequence) -> None:
        """A waiting sequence that is not wanted any more."""
        self.release(sequence)
        self.num_left += 1

    def release(self, sequence: Sequence) -> None:
        """A sequence that goes to another queue, which says nothing of how fast this one moves."""
        self._take_out(bisect_left(self._queue, sequence.order, key=by_order))
        if self._blocked is sequence:
            self._blocked = None

    def _take_out(self, index: int) -> None:
        sequence = self._queue.pop(index)
        self._tokens.give_back(sequence.caller, _own_tokens(sequence))

    def admit(self, num_running: int, before: Any = None) -> Sequence | None:
        """Gives the first sequence that may start its blocks, and takes it out of the queue.

        None if there is no such sequence, or none that is ordered before `before`, or too few blocks for it: then
        nobody behind it may take them.
        """
        for index, sequence in enumerate(self._queue):
            if before is not None and sequence.order > before:
                return None
            if _follows_leader(sequence):
                continue
            if sequence.leader is not None and not sequence.digests:
                num_full = len(sequence.prompt_tokens) // self._blocks.block_size
                sequence.digests = sequence.leader.digests[:num_full]  # of the same prompt
            if not self._allocate(sequence, num_running):
                return None
            self._take_out(index)
            self.num_left += 1
            return sequence
        return None

    def _lacks_blocks(self) -> bool:
        """Whether the first sequence found too few blocks, and none were released since."""
        return self._blocked is not None and self._blocked_at == self._blocks.num_releases

    def _allocate(self, sequence: Sequence, num_running: int) -> bool:
        blocks = self._blocks
        if self._blocked is sequence and self._blocked_at == blocks.num_releases:
            return False
        if not give_blocks(sequence, blocks, num_running):
            self._blocked, self._blocked_at = sequence, blocks.num_releases
            return False
        self._blocked = None
        return True


def _own_tokens(sequence: Sequence) -> int:
    """Tokens that are kept for this sequence alone: all completions of a request have one prompt, their leader's."""
    return sequence.num_tokens if sequence.leader is None else len(sequence.output_tokens)


def _follows_leader(sequence: Sequence) -> bool:
    """Whether a sequence has yet to wait for its leader's prompt."""
    leader = sequence.leader
    return leader is not None and not leader.removed and leader.num_computed < len(leader.prompt_tokens)
