"""What runs next. Pure: state in, plan out; nothing here waits, sends or reads a clock.

A sequence waits, runs (it has a slot and blocks), and is removed. While it runs, one rule serves prefill, decode and
recompute after a preemption alike: a row is `tokens[num_computed : num_computed + n]`, and where it reaches the end
of the token log its logits are wanted and the sequence awaits its next token. So a prompt's next chunk can be
dispatched while the one before is still on its way.

All of it rests on the shards' promise to run micro-batches first in, first out, and to write the K/V of all rows of a
micro-batch before any of them attends. Slots and blocks are therefore free for others the moment a sequence lets them
go, and a block can be shared the moment the row that fills it is dispatched.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from stagecoach.errors import OutOfRange, Overloaded
from stagecoach_router.scheduling.admission import Admission
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.deadlines import Deadlines
from stagecoach_router.scheduling.pacing import Pace, Pacing, Prompts, even_chunk_tokens
from stagecoach_router.scheduling.plan import BlockTableUpdate, Draft, Plan, Row
from stagecoach_router.scheduling.running import RunningSequences
from stagecoach_router.scheduling.sequence import Sequence
from stagecoach_router.scheduling.waiting_queue import by_priority_then_arrival, token_limit

# Where decodes fill whole steps, every other step keeps this part of its tokens for prefill.
MIN_PREFILL_FRACTION = 4


class Scheduler:
    """Sequences in, plans out.

    max_batch_tokens: tokens of one step. max_running: slots. max_waiting: sequences beyond those that can start right
    away. num_lanes: steps in flight; where `pacing` is given, it decides that, and how long chunks of prefill are.
    max_logit_rows: rows of one step that want logits (whole rows of a vocabulary are large); None: as many as run.
    context_length: tokens of one sequence, prompt and output. order_key: sorts first what is to be admitted first and
    preempted last; taken once for each sequence, ties go by seq_id.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_waiting: int,
        num_lanes: int = 1,
        context_length: int,
        max_logit_rows: int | None = None,
        pacing: Pacing | None = None,
        order_key: Callable[[Sequence], Any] = by_priority_then_arrival,
    ) -> None:
        assert min(max_batch_tokens, max_running, num_lanes, context_length) >= 1
        assert max_waiting >= 0, max_waiting
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.pacing = pacing
        self.context_length = context_length
        self.max_logit_rows = max_logit_rows or max_running
        self.num_preemptions = 0  # for want of blocks; preempt_all does not count
        self._order_key = order_key
        self._fixed_pace = Pace(num_lanes)
        self._running = RunningSequences(blocks, max_running)
        self._admission = Admission(blocks, self._running, max_waiting)
        self._in_flight: set[Plan] = set()
        self._deadlines = Deadlines()
        self._prefill_is_due = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._admission)

    @property
    def num_lanes(self) -> int:
        """Steps that may be in flight now."""
        return self._pace(self._admission.on_trial).num_lanes

    @property
    def num_in_flight(self) -> int:
        """Steps that were scheduled and have not been completed."""
        return len(self._in_flight)

    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._admission) or bool(self._running)

    @property
    def retry_after_s(self) -> float:
        """The last estimate of when a refused caller may come again."""
        return self._admission.retry_after_s

    def check_room(self, num_sequences: int, now_s: float) -> None:
        """Raises Overloaded, with when to come again, if `add` would not take so many more now.

        Raises OutOfRange for more than could be here at any time.
        """
        most = self.max_running + self.max_waiting
        if num_sequences > most:
            raise OutOfRange(
                f"n: {num_sequences} completions; at most {most} sequences may run and wait",
                field="n",
                limit=most,
                value=num_sequences,
            )
        self._admission.check_room(num_sequences=num_sequences, now_s=now_s)

    def has_room(self, sequence: Sequence) -> bool:
        """Whether `add` would take a sequence now, and the siblings that are to follow it."""
        try:
            self._admission.check_room(num_sequences=sequence.params.n, sequence=sequence)
        except Overloaded:
            return False
        return True

    def add(self, sequence: Sequence, *, was_accepted: bool = False) -> None:
        """Queues a sequence; sets its `token_limit`, at which the caller has to remove it.

        Raises OutOfRange if it can never fit the K/V cache, Overloaded if the queue is full and it was not accepted
        before, by another process.
        """
        assert sequence.order is None, f"{sequence} was added before"
        sequence.token_limit = token_limit(
            sequence, context_length=self.context_length, capacity=self.blocks.capacity_tokens
        )
        if not was_accepted:
            self._admission.check_room(sequence=sequence)
        sequence.order = (self._order_key(sequence), sequence.seq_id)
        self._admission.join(sequence)

    def schedule(self) -> Plan | None:
        """The next step. None: nothing can be computed before a step completes or a token is appended."""
        self._admission.take_turns(len(self._in_flight))
        suspect = self._admission.on_trial
        pace = self._pace(suspect)
        if len(self._in_flight) >= pace.num_lanes:
            return None
        draft = Draft(self.max_batch_tokens, self.max_logit_rows)
        if suspect is None:
            self._plan_together(draft, pace)
        elif not self._admission.turn_is_over and all(plan.rows[0].sequence is suspect for plan in self._in_flight):
            self._plan_alone(suspect, draft, pace)  # else what is under way comes back first
        if not draft.rows:
            return None
        self._admission.stepped()
        plan = Plan(tuple(draft.rows.values()), tuple(draft.block_table_updates), self.max_batch_tokens - draft.room)
        self._in_flight.add(plan)
        return plan

    def _plan_together(self, draft: Draft, pace: Pace) -> None:
        """Adds decodes and prefill of all that may run."""
        # Decodes of one step, so that all lanes get as many. The ones left over go into the next step.
        share = -(-self._running.num_decoding // pace.num_lanes)
        if self._prefill_is_due:
            num_decodes = min(len(self._running.ready), share)
            least = max(1, self.max_batch_tokens // MIN_PREFILL_FRACTION)
            self._plan_prefill(draft, max(least, self.max_batch_tokens - num_decodes), pace)
            num_prefill_rows = len(draft.rows)
            self._plan_decodes(draft, share)
        else:
            self._plan_decodes(draft, share)
            num_decodes = len(draft.rows)
            self._plan_prefill(draft, draft.room, pace)
            num_prefill_rows = len(draft.rows) - num_decodes
        is_full = not (draft.room and draft.logit_room)
        self._prefill_is_due = is_full and not num_prefill_rows and bool(self._running.prefilling or self._admission)

    def _plan_alone(self, suspect: Sequence, draft: Draft, pace: Pace) -> None:
        """Adds the next row of a sequence on trial."""
        running = self._running
        if suspect in running.prefilling:
            num_left = suspect.num_tokens - suspect.num_computed
            chunk_tokens = pace.chunk_tokens or even_chunk_tokens([num_left], pace.num_lanes, self.max_batch_tokens)
            self._dispatch(suspect, min(draft.room, chunk_tokens, num_left), draft)
            if suspect.awaiting_token:
                running.prefilling.remove(suspect)
        elif suspect in running.ready:
            if self._make_room(suspect, draft):
                del running.ready[suspect]
                self._dispatch(suspect, 1, draft)
            else:
                self._admission.end_trial(suspect)

    def complete(self, plan: Plan) -> list[Row]:
        """A step came back: the rows whose logits are to be sampled from.

        For each of them append_token, repeat or remove has to follow; until then its sequence is not preempted for
        want of blocks. Rows of sequences that were removed or preempted since dispatch are left out, and a plan older
        than preempt_all has none.
        """
        if plan not in self._in_flight:
            return []
        self._in_flight.remove(plan)
        rows = [row for row in plan.rows if row.wants_logits and row.incarnation == row.sequence.incarnation]
        for row in rows:
            row.sequence.sampling = True
        return rows

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """A token was sampled from the logits that `complete` handed out. The sequence is ready again."""
        assert sequence.num_tokens < sequence.token_limit, f"{sequence} is past its limit"
        self._running.resume(sequence)
        sequence.output_tokens.append(token_id)

    def repeat(self, sequence: Sequence) -> None:
        """The logits that `complete` handed out did not do: the last position is computed once more."""
        self._running.resume(sequence)
        sequence.num_computed -= 1

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, in whatever state it is; again is harmless. Its full blocks stay in the prefix cache."""
        if sequence.slot is not None:
            self._running.unseat(sequence)
        elif sequence.order is not None and not sequence.removed:
            self._admission.leave(sequence)
        sequence.removed = True
        self._deadlines.discard(sequence)

    def release(self, sequence: Sequence) -> float | None:
        """Lets go of a sequence for another scheduler to adopt. Returns its deadline."""
        if sequence.slot is not None:
            self._running.unseat(sequence)
        else:
            self._admission.release(sequence)
        return self._deadlines.discard(sequence)

    def adopt(self, sequence: Sequence, deadline_s: float | None) -> None:
        """Queues a sequence that another scheduler has released, however many wait: it was accepted once."""
        assert sequence.token_limit <= self.blocks.capacity_tokens, f"{sequence} does not fit"
        self._admission.adopt(sequence)
        self.set_deadline(sequence, deadline_s)

    @property
    def next_deadline_s(self) -> float | None:
        """The first deadline of all: when `expire` has something to do."""
        return self._deadlines.next_s

    def set_deadline(self, sequence: Sequence, deadline_s: float | None) -> None:
        """When a sequence that was added has to be finished, in seconds of `expire`'s clock; None: whenever."""
        if deadline_s is None or sequence.removed:
            self._deadlines.discard(sequence)
        else:
            self._deadlines.set(sequence, deadline_s)

    def expire(self, now_s: float) -> list[Sequence]:
        """Removes the sequences whose deadline has passed, whether they wait or run; returns them."""
        expired = self._deadlines.take_expired(now_s)
        for sequence in expired:
            self.remove(sequence)
        return expired

    def preempt_all(self) -> None:
        """The pipeline is lost: what ran waits again, in order, and what was in flight or cached is forgotten.

        Logits that `complete` handed out, and that no token came from yet, will be computed again.
        """
        self._admission.take_back_all()
        self._in_flight.clear()
        self.blocks.reset()
        if self.pacing is not None:
            self.pacing.reset()

    # ---- prefill and admission

    def _plan_prefill(self, draft: Draft, max_tokens: int, pace: Pace) -> None:
        """Adds chunks of up to `max_tokens` tokens in all, first in order first."""
        left = (each.num_tokens - each.num_computed for each in chain(self._running.prefilling, self._admission))
        chunk_tokens = pace.chunk_tokens or even_chunk_tokens(left, pace.num_lanes, self.max_batch_tokens)
        room = min(max_tokens, draft.room, chunk_tokens)
        while room and draft.logit_room and (sequence := self._admission.next_to_prefill()):
            num_tokens = min(room, sequence.num_tokens - sequence.num_computed)
            self._dispatch(sequence, num_tokens, draft)
            room -= num_tokens
            if sequence.awaiting_token:
                del self._running.prefilling[0]

    def _pace(self, suspect: Sequence | None = None) -> Pace:
        """The pace of what is computed now: all that runs, or only a sequence on trial."""
        if self.pacing is None:
            return self._fixed_pace
        if suspect is None:
            prompts = [*self._running.prefilling, *self._admission.starting()]
            return self.pacing.pace(self._running.num_decoding, Prompts.of(prompts))
        if suspect in self._running.prefilling:
            return self.pacing.pace(0, Prompts.of([suspect]))
        return self.pacing.pace(1)

    # ---- decodes and preemption

    def _plan_decodes(self, draft: Draft, share: int) -> None:
        """Adds up to `share` ready sequences, longest ready first.

        One that gets no block stalls: it keeps its place and its blocks.
        """
        num_left = min(draft.room, draft.logit_room, share)
        stalled = None  # one at most: what needs a block after it and is earlier in order preempts it
        ready = self._running.ready
        while num_left and ready:
            sequence, _ = ready.popitem(last=False)
            if self._make_room(sequence, draft):
                self._dispatch(sequence, 1, draft)
                num_left -= 1
            else:
                stalled = sequence
        if stalled is not None and stalled.slot is not None:
            ready[stalled] = None
            ready.move_to_end(stalled, last=False)

    def _make_room(self, sequence: Sequence, draft: Draft) -> bool:
        """Gets a block for the next position if it needs one, from a sequence that is later in order if it must.

        Nobody is ever preempted for one that is later in order. So the first in order goes on until it is finished,
        then the next one is first: two sequences cannot preempt each other for ever.
        """
        while not self.blocks.extend(sequence, sequence.num_computed + 1):
            victim = self._running.find_victim(sequence, draft)
            if victim is None:
                return False
            self._running.unseat(victim)
            self._admission.join(victim)
            self.num_preemptions += 1
        return True

    def _dispatch(self, sequence: Sequence, num_tokens: int, draft: Draft) -> None:
        """Adds the sequence's next `num_tokens` positions to the draft."""
        slot, start = sequence.slot, sequence.num_computed
        assert slot is not None
        end = start + num_tokens
        wants_logits = end == sequence.num_tokens
        sequence.num_computed = end
        sequence.awaiting_token = wants_logits
        # A position whose logits are wanted may be repeated, so the block it fills has to wait for the next row.
        self.blocks.commit(sequence, end - 1 if wants_logits else end)
        first = sequence.num_sent_blocks
        if first < len(sequence.block_ids):
            draft.block_table_updates.append(BlockTableUpdate(slot, first, tuple(sequence.block_ids[first:])))
            sequence.num_sent_blocks = len(sequence.block_ids)
        draft.rows[sequence] = Row(sequence, slot, start, num_tokens, wants_logits, sequence.incarnation)
        draft.room -= num_tokens
        draft.logit_room -= wants_logits
