"""The router's heart: requests in, pieces of text out, and the pipeline kept busy in between.

Everything runs on one event loop, driven by events: a request, a result or a cancellation changes the scheduler's
state, then `_pump` sends every step that has become possible. When the pipeline is lost, all sequences go back to
waiting with their token logs, the pipeline is opened again under the next epoch, and generation goes on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from stagecoach import errors
from stagecoach.v1 import shard_pb2
from stagecoach_router.canary import Canary
from stagecoach_router.completion import Completion, Piece
from stagecoach_router.outputs import NeedsWholeRow, OutputWant, Sampled, wanted_output, wider_output
from stagecoach_router.pacing import StageSeconds
from stagecoach_router.penalties import TokenCounts
from stagecoach_router.pieces import Pieces
from stagecoach_router.pipeline import LostHandler, Pipeline, ResultHandler
from stagecoach_router.pipeline_totals import ActiveTime
from stagecoach_router.request import Request
from stagecoach_router.scheduler import Plan, Row, Scheduler
from stagecoach_router.sequence import Sequence
from stagecoach_router.slowness import Slowness
from stagecoach_router.step_cost import StepShape
from stagecoach_router.step_sampler import Choice, Chooser, choose_tokens
from stagecoach_router.tokenizer import Tokenizer
from stagecoach_router.wire import GroupOutputs, OutputOrder, read_outputs, write_micro_batch

logger = logging.getLogger(__name__)

REOPEN_FIRST_DELAY_S = 0.1
REOPEN_MAX_DELAY_S = 2.0
# A caller that reads so much slower than its answer is generated is cut off.
MAX_UNREAD_PIECES = 4096
# A sequence that ran each time the pipeline was lost, and got no token in between, may be what breaks it.
MAX_REPLAYS_WITHOUT_PROGRESS = 3

# Opens the pipeline in an epoch: (epoch, on_result, on_lost).
Connect = Callable[[int, ResultHandler, LostHandler], Awaitable[Pipeline]]


class Generation:
    """One request on its way, and its pieces."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pieces = Pieces(request.params.n)
        self.runs: list[_Run] = []


@dataclass(eq=False, slots=True)
class _Run:
    """One sequence with everything that follows it."""

    generation: Generation
    sequence: Sequence
    completion: Completion
    chooser: Chooser
    want: OutputWant
    retry: OutputWant | None = None  # for the next logits only: more than `want`, which did not do
    num_losses: int = 0  # of the pipeline, since its last token

    def replay(self, past: Many[Sampled]) -> bool:
        """Takes tokens that were sampled before. Returns whether the completion is finished with them."""
        for sampled in past:
            self.sequence.output_tokens.append(sampled.token_id)
            self.chooser.counts.add(sampled.token_id)
            piece = self.completion.advance(sampled)
            self.generation.pieces.put(piece)
            if piece.finish_reason is not None:
                return True
        return False


@dataclass(frozen=True, slots=True)
class _Step:
    plan: Plan
    order: OutputOrder
    shape: StepShape
    number: int
    sent_s: float  # time.perf_counter()
    is_canary: bool = False


@dataclass(slots=True)
class Counters:
    """What the router did since it started."""

    num_finished: int = 0
    prompt_tokens: int = 0
    looked_up_prompt_tokens: int = 0  # in the prefix cache, where cached_prompt_tokens of them were
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    num_repeats: int = 0  # rows computed once more because their candidates did not determine the token


class Engine:
    """Generates for many requests over one pipeline.

    `connect` opens the pipeline; `on_ready` is told when a token has come through it, and when it is lost; `canary`
    says when to try that without a request; `slowness` finds a stage that is much slower than it was, which loses the
    pipeline; `max_batch_tokens` is taken where all its shards take so many; `recovery_timeout_s` is how long requests
    wait for a lost one before they fail.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        connect: Connect,
        on_ready: Callable[[bool], None],
        canary: Canary,
        slowness: Slowness | None = None,
        max_batch_tokens: int,
        recovery_timeout_s: float,
    ) -> None:
        self.scheduler = scheduler
        self.counters = Counters()
        self.active_time = ActiveTime()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._connect = connect
        self._on_ready = on_ready
        self._canary = canary
        self._slowness = slowness
        self.ready = False
        self._max_batch_tokens = max_batch_tokens
        self._recovery_timeout_s = recovery_timeout_s
        self.pipeline: Pipeline | None = None
        self._epoch = 0
        self._next_step = 1
        self._next_seq_id = 1
        self._runs: dict[int, _Run] = {}
        self._in_flight: deque[_Step] = deque()
        self._next_expiry: asyncio.TimerHandle | None = None
        self._lost = asyncio.Event()
        self._reopen_delay_s = REOPEN_FIRST_DELAY_S

    async def open(self) -> None:
        """Opens the pipeline, and goes on with what waits. Raises what `connect` raises."""
        self._epoch += 1
        self._next_step = 1
        self._in_flight.clear()
        self._lost.clear()
        self.pipeline = await self._connect(self._epoch, self._on_result, self._on_lost)
        self._fit(self.pipeline)
        self._canary.forget()
        if self.pipeline.lost is None:
            self._send_canary(self.pipeline)
        self._pump()

    def _fit(self, pipeline: Pipeline) -> None:
        """Takes over what the pipeline's smallest stage can hold; what was accepted and fits no more, fails."""
        scheduler = self.scheduler
        scheduler.max_batch_tokens = min(self._max_batch_tokens, pipeline.max_batch_tokens)
        scheduler.blocks.reset(pipeline.num_blocks - 1)  # the last one is the canary's
        if scheduler.pacing is not None:
            scheduler.pacing.limit_lanes(pipeline.max_queued_steps)
            scheduler.pacing.limit_steps(scheduler.max_logit_rows, scheduler.max_batch_tokens)
        capacity = scheduler.blocks.capacity_tokens
        for run in list(self._runs.values()):
            if run.sequence.token_limit > capacity:
                text = f"the pipeline came back with room for {capacity} tokens"
                self._fail(run.generation, errors.OutOfRange(text, field="max_tokens", limit=capacity))

    async def run(self) -> None:
        """Brings the pipeline back whenever it is lost, and tries it while it idles. Runs until cancelled."""
        await asyncio.gather(self._reopen_whenever_lost(), self._prove_regularly())

    async def _reopen_whenever_lost(self) -> None:
        while True:
            await self._lost.wait()
            await self._reopen()

    async def _prove_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._canary.interval_s / 4)
            self._prove()

    def _prove(self) -> None:
        """Where no token has come for a while and none is under way: sends a canary."""
        pipeline = self.pipeline
        if pipeline is None or pipeline.lost is not None or not self._canary.is_due(time.perf_counter()):
            return
        self._pump()
        if self._in_flight:
            return
        if self.scheduler.has_work():  # then a canary's token would prove nothing
            if self.ready:
                logger.error("sequences wait, and nothing can be scheduled")
            self._set_ready(False)
            return
        self._send_canary(pipeline)

    def _send_canary(self, pipeline: Pipeline) -> None:
        plan = self._canary.plan(pipeline.num_blocks - 1)
        self._send(pipeline, plan, self._canary.wants, is_canary=True)

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self._on_ready(ready)

    async def close(self) -> None:
        """Fails what runs, and closes the pipeline."""
        self._fail_all(errors.Unavailable("the router is stopping"))
        self._expire()  # no deadline is left
        if self.pipeline is not None:
            await self.pipeline.close()

    def check_room(self, num_sequences: int) -> None:
        """Raises Overloaded where `submit` would: before anything is spent on a request."""
        self.scheduler.check_room(num_sequences, time.monotonic())

    def submit(self, request: Request, past: Many[Many[Sampled]] = ()) -> Generation:
        """Begins a request, or goes on with one that has had the tokens of `past`, by completion.

        Raises Overloaded or OutOfRange, and then nothing was begun.
        """
        generation = Generation(request)
        params = request.params
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        leader: Sequence | None = None
        try:
            for index in range(params.n):
                run = self._new_run(generation, index, seed, leader)
                generation.runs.append(run)
                if past and run.replay(past[index]):
                    continue
                leader = leader or run.sequence
                self.scheduler.add(run.sequence)
                self._runs[run.sequence.seq_id] = run
        except errors.StagecoachError:
            self.cancel(generation)
            raise
        self.counters.prompt_tokens += len(request.prompt_tokens) * params.n
        self._pump()
        return generation

    def cancel(self, generation: Generation) -> None:
        """Ends a request wherever it is; its blocks are free at once. Harmless for one that is finished."""
        for run in generation.runs:
            if self._runs.pop(run.sequence.seq_id, None) is not None:
                self.scheduler.remove(run.sequence)
        self._pump()

    def set_deadline(self, generation: Generation, deadline_s: float | None) -> None:
        """When a request has to be finished, in seconds of time.monotonic(); None: whenever. It fails then."""
        for run in generation.runs:
            if run.sequence.seq_id in self._runs:
                self.scheduler.set_deadline(run.sequence, deadline_s)
        self._expire()

    def _expire(self) -> None:
        """Fails what is past its deadline, and comes back when the next one is."""
        if self._next_expiry is not None:
            self._next_expiry.cancel()
            self._next_expiry = None
        now_s = time.monotonic()
        for sequence in self.scheduler.expire(now_s):
            run = self._runs.get(sequence.seq_id)
            if run is not None:  # else it went with another of its request's completions
                self._fail(run.generation, errors.DeadlineExceeded("the deadline of the call has passed"))
        next_s = self.scheduler.next_deadline_s
        if next_s is not None:
            self._next_expiry = asyncio.get_running_loop().call_later(max(0.0, next_s - now_s), self._expire)

    def _new_run(self, generation: Generation, index: int, seed: int, leader: Sequence | None) -> _Run:
        request = generation.request
        sequence = Sequence(
            seq_id=self._next_seq_id,
            prompt_tokens=request.prompt_tokens,
            params=request.params,
            seed=seed,
            index=index,
            priority=request.priority,
            leader=leader,
            cache_salt=request.cache_salt,
        )
        self._next_seq_id += 1
        return _Run(
            generation,
            sequence,
            Completion(index, request.prompt_tokens, request.params, self._tokenizer),
            Chooser(sequence, TokenCounts(request.prompt_tokens)),
            wanted_output(request.params, self._vocab_size),
        )

    def _pump(self) -> None:
        """Sends every step that can go now."""
        pipeline = self.pipeline
        if pipeline is None or pipeline.lost is not None:
            return
        while (plan := self.scheduler.schedule()) is not None:
            wants = {row.sequence.seq_id: self._want(row) for row in plan.rows if row.wants_logits}
            self._send(pipeline, plan, wants)
        self.active_time.set(self.scheduler.num_running > 0)

    def _send(self, pipeline: Pipeline, plan: Plan, wants: dict[int, OutputWant], *, is_canary: bool = False) -> None:
        frame, order = write_micro_batch(
            plan, wants, lease_id=pipeline.lease_id, epoch=self._epoch, step=self._next_step
        )
        shape = StepShape.of(plan.rows)
        self._in_flight.append(_Step(plan, order, shape, self._next_step, time.perf_counter(), is_canary))
        self._next_step += 1
        pipeline.send(frame, self._canary.expected_s if is_canary else self._expected_s(shape))

    def _expected_s(self, shape: StepShape) -> float | None:
        pacing = self.scheduler.pacing
        return None if pacing is None else pacing.expected_s(shape)

    def _want(self, row: Row) -> OutputWant:
        run = self._runs[row.sequence.seq_id]
        return run.retry or run.want

    def _on_result(self, result: shard_pb2.StepResult, payload: memoryview) -> None:
        """Raises ShardFault for a result that is not what was asked for; the pipeline is lost then."""
        expected = (self._epoch, self._in_flight[0].number if self._in_flight else None)
        if (result.epoch, result.step) != expected:
            raise errors.ShardFault(f"(epoch, step) {expected} expected, {(result.epoch, result.step)} came")
        step = self._in_flight.popleft()
        round_trip_s = time.perf_counter() - step.sent_s
        outputs = read_outputs(result, payload, step.order, self._vocab_size)
        if step.is_canary:
            self._take_canary(outputs, round_trip_s)
            return
        pieces: list[tuple[Generation, Piece]] = []
        try:
            self._take_tokens(step, outputs, pieces)
            self._pump()
        finally:  # whatever went wrong: their tokens are in the log, and would not come again
            # Last: each wakes a call's task, and the next step's frame is not to wait behind them.
            for generation, piece in pieces:
                generation.pieces.put(piece)
        stages = [StageSeconds(timing.queue_s, timing.compute_s) for timing in result.timings]
        self.scheduler.observe(step.plan, stages, round_trip_s)
        if self._slowness is not None:
            slow = self._slowness.observe(step.shape, stages, time.monotonic())
            if slow is not None:
                raise errors.Unavailable(f"stage {slow} has become many times slower")

    def _take_canary(self, outputs: list[GroupOutputs], round_trip_s: float) -> None:
        """Raises ShardFault where no token can be chosen from what came."""
        self._canary.take(outputs, time.perf_counter(), round_trip_s)
        if not self._runs:
            self._reopen_delay_s = REOPEN_FIRST_DELAY_S
        self._set_ready(True)

    def _take_tokens(self, step: _Step, outputs: list[GroupOutputs], pieces: list[tuple[Generation, Piece]]) -> None:
        """Samples for all rows of a step; adds what that gives to `pieces`."""
        current = {row.sequence.seq_id for row in self.scheduler.complete(step.plan)}
        for rows, group in outputs:
            # Those that are still there: a failure takes all completions of its request with it.
            indices = [
                index
                for index, row in enumerate(rows)
                if row.sequence.seq_id in current and row.sequence.seq_id in self._runs
            ]
            live = group if len(indices) == len(rows) else group.take(indices)
            runs = [self._runs[rows[index].sequence.seq_id] for index in indices]
            for run, choice in zip(runs, choose_tokens(live, [run.chooser for run in runs]), strict=True):
                piece = self._advance(run, choice)
                if piece is not None:
                    pieces.append((run.generation, piece))
        if pieces:
            self._canary.token_came(time.perf_counter())
            self._set_ready(True)

    def _advance(self, run: _Run, sampled: Choice) -> Piece | None:
        """Takes a sequence's next token; returns what it adds, None where there is no token."""
        sequence = run.sequence
        if sequence.removed:  # with another of its request's completions, a moment ago
            return None
        if len(run.generation.pieces) >= MAX_UNREAD_PIECES:
            self._fail(run.generation, errors.Overloaded("the answer is not being read", limit=MAX_UNREAD_PIECES))
            return None
        if isinstance(sampled, errors.ShardFault):  # no number among this row's logits: nobody else's fault
            self._fail(run.generation, sampled)
            return None
        if isinstance(sampled, NeedsWholeRow):
            run.retry = wider_output(run.retry or run.want, self._vocab_size)
            self.counters.num_repeats += 1
            self.scheduler.repeat(sequence)
            return None
        run.retry = None
        run.num_losses = 0
        self._reopen_delay_s = REOPEN_FIRST_DELAY_S
        self.counters.completion_tokens += 1
        if not sequence.output_tokens:
            self.counters.looked_up_prompt_tokens += len(sequence.prompt_tokens)
            self.counters.cached_prompt_tokens += sequence.num_cached
        run.chooser.counts.add(sampled.token_id)
        self.scheduler.append_token(sequence, sampled.token_id)
        piece = run.completion.advance(sampled)
        if piece.finish_reason is not None:
            del self._runs[sequence.seq_id]
            self.scheduler.remove(sequence)
            self.counters.num_finished += 1
        return piece

    def _on_lost(self, error: errors.StagecoachError) -> None:
        logger.warning("pipeline lost in epoch %d: %s", self._epoch, error)
        self._set_ready(False)
        if self.pipeline is not None and self.pipeline.lost is None:
            self.pipeline.lost = error
        self._give_up_on_suspects(error)
        self.scheduler.preempt_all()
        if self._slowness is not None:
            self._slowness.forget()
        self.active_time.set(False)
        self._in_flight.clear()
        self._lost.set()

    async def _reopen(self) -> None:
        """Opens the pipeline again; requests fail once that has taken too long, and the attempts go on."""
        began = time.monotonic()
        if self.pipeline is not None:
            await self.pipeline.close()
        while True:
            await asyncio.sleep(self._reopen_delay_s)  # also when it opens well, and breaks with its first step
            self._reopen_delay_s = min(2 * self._reopen_delay_s, REOPEN_MAX_DELAY_S)
            try:
                await self.open()
            except errors.StagecoachError as error:
                logger.warning("pipeline not back yet: %s", error)
                if time.monotonic() - began > self._recovery_timeout_s:
                    self._fail_all(
                        errors.Unavailable(f"the pipeline is lost: {error}", retry_after_s=REOPEN_MAX_DELAY_S)
                    )
                continue
            logger.info("pipeline back in epoch %d after %.2f s", self._epoch, time.monotonic() - began)
            return

    def _give_up_on_suspects(self, error: errors.StagecoachError) -> None:
        """Those with a row in a step that was under way. Whoever only waited for a step cannot have broken anything."""
        suspects = {row.sequence.seq_id for step in self._in_flight for row in step.plan.rows}
        for run in [run for seq_id, run in self._runs.items() if seq_id in suspects]:
            run.num_losses += 1
            if run.num_losses > MAX_REPLAYS_WITHOUT_PROGRESS:
                text = f"the pipeline was lost {run.num_losses} times while it computed this request: {error}"
                self._fail(run.generation, errors.ShardFault(text))

    def _fail_all(self, error: errors.StagecoachError) -> None:
        failed = {id(run.generation): run.generation for run in self._runs.values()}
        for generation in failed.values():
            self._fail(generation, error)

    def _fail(self, generation: Generation, error: errors.StagecoachError) -> None:
        self.cancel(generation)
        generation.pieces.fail(error)
