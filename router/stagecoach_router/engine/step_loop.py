"""The steps of one open pipeline: plans out, tokens in, and what is under way between. Ends with its epoch."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from stagecoach import errors
from stagecoach.v1 import shard_pb2
from stagecoach_router.engine.health_probe import HealthProbe
from stagecoach_router.engine.straggler import StragglerDetector
from stagecoach_router.engine.wire import GroupOutputs, OutputOrder, read_outputs, write_micro_batch
from stagecoach_router.metrics.counters import Counters
from stagecoach_router.pipelines.pipeline import Pipeline
from stagecoach_router.requests.completion import OutputDelta
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import CandidateRows, InsufficientCandidates, WholeRows, wider_output
from stagecoach_router.sampling.sampler import Choice, choose_tokens
from stagecoach_router.scheduling.cost_model import StepShape
from stagecoach_router.scheduling.pacing import StageSeconds
from stagecoach_router.scheduling.plan import Plan
from stagecoach_router.scheduling.scheduler import Scheduler
from stagecoach_router.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Step:
    plan: Plan
    order: OutputOrder
    shape: StepShape
    number: int
    sent_s: float  # time.perf_counter()
    is_probe: bool = False


class StepOwner(Protocol):
    """Whose steps they are."""

    @property
    def counters(self) -> Counters:
        """To which is added what is done."""

    def token_came(self, *, is_probe: bool) -> None:
        """At least one token has come; `is_probe`: and it was only the probe's."""

    def fail(self, request: RequestState, error: errors.StagecoachError) -> None:
        """Ends all of a request, and sends nothing."""


class StepLoop:
    """Sends what `scheduler` plans over `pipeline`, and gives the tokens that come to `requests`, by seq_id.

    A sequence that finishes is taken out of `requests`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: Scheduler,
        requests: dict[int, RequestState],
        probe: HealthProbe,
        straggler: StragglerDetector,
        owner: StepOwner,
    ) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._requests = requests
        self._vocab_size = pipeline.vocab_size
        self._probe = probe
        self._straggler = straggler
        self._counters = owner.counters
        self._owner = owner
        assert scheduler.pacing is not None, "set when the pipeline was opened"
        self._pacing = scheduler.pacing
        self._next_step = 1
        self._in_flight: deque[_Step] = deque()  # the first one until all of its result is taken
        # What breaks before any token has come is nobody's fault but the pipeline's: so no request is sent before.
        self._is_proven = False
        self._is_taking = False  # a step's tokens: what is scheduled meanwhile would leave half filled

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def under_way(self) -> dict[RequestState, list[Sequence]]:
        """The sequences that have a row in a step that has not come back, or whose result was no good, by request."""
        rows = {row.sequence.seq_id: row.sequence for step in self._in_flight for row in step.plan.rows}
        under_way: dict[RequestState, list[Sequence]] = {}
        for seq_id, request in self._requests.items():
            if seq_id in rows:
                under_way.setdefault(request, []).append(rows[seq_id])
        return under_way

    def send_all(self) -> None:
        """Sends every step that can go now."""
        if self._pipeline.lost is not None or self._is_taking or not self._is_proven:
            return
        while (plan := self._scheduler.schedule()) is not None:
            self._send(plan)

    def send_probe(self) -> None:
        """Asks for a token that is nobody's."""
        self._send(self._probe.plan(self._pipeline.num_blocks - 1), is_probe=True)

    def take(self, result: shard_pb2.StepResult, payload: memoryview) -> None:
        """The oldest step has come back.

        Raises ShardFault for a result that is not what was asked for, Unavailable for a stage that is much too slow;
        the pipeline is lost then.
        """
        expected = (self._pipeline.epoch, self._in_flight[0].number if self._in_flight else None)
        if (result.epoch, result.step) != expected:
            raise errors.ShardFault(f"(epoch, step) {expected} expected, {(result.epoch, result.step)} came")
        step = self._in_flight[0]
        round_trip_s = time.perf_counter() - step.sent_s
        outputs = read_outputs(result, payload, step.order, self._vocab_size)
        if step.is_probe:
            self._probe.take(outputs, time.perf_counter(), round_trip_s)
            self._in_flight.popleft()
            self._prove(is_probe=True)
            return
        if self._take_step(step, outputs):
            self._probe.token_came(time.perf_counter())
            self._prove(is_probe=False)
        stages = [StageSeconds(timing.queue_s, timing.compute_s) for timing in result.timings]
        self._pacing.observe(step.shape, stages, round_trip_s)
        slow = self._straggler.observe(step.shape, stages, round_trip_s, time.monotonic())
        if slow is not None:
            address = self._pipeline.stages[slow].address
            text = f"stage {slow} at {address} has become many times slower"
            raise errors.Unavailable(text, addresses=[address])

    def _send(self, plan: Plan, *, is_probe: bool = False) -> None:
        pipeline = self._pipeline
        frame, order = write_micro_batch(plan, lease_id=pipeline.lease_id, epoch=pipeline.epoch, step=self._next_step)
        shape = StepShape.of(plan.rows)
        self._in_flight.append(_Step(plan, order, shape, self._next_step, time.perf_counter(), is_probe))
        self._next_step += 1
        pipeline.send(frame, self._probe.expected_s if is_probe else self._pacing.expected_s(shape))

    def _prove(self, *, is_probe: bool) -> None:
        was_proven, self._is_proven = self._is_proven, True
        self._owner.token_came(is_probe=is_probe)
        if not was_proven:
            self.send_all()

    def _take_step(self, step: _Step, outputs: list[GroupOutputs]) -> bool:
        """Takes the tokens of a step that has come back, and sends the next. Returns whether there was a token."""
        deltas: list[tuple[RequestState, OutputDelta]] = []
        self._is_taking = True
        try:
            self._take_tokens(step, outputs, deltas)
            self._in_flight.popleft()
            self._is_taking = False
            self.send_all()
        finally:  # whatever went wrong: their tokens are in the log, and would not come again
            # Last: each wakes a call's task, and the next step's frame is not to wait behind them.
            for request, delta in deltas:
                self._put(request, delta)
        return bool(deltas)

    def _put(self, request: RequestState, delta: OutputDelta) -> None:
        try:
            request.put(delta)
        except Exception as error:  # a bug: the others are to get theirs
            self._owner.fail(request, _unforeseen("delivering", request.sequences[delta.index], error))

    def _take_tokens(
        self, step: _Step, outputs: list[GroupOutputs], deltas: list[tuple[RequestState, OutputDelta]]
    ) -> None:
        """Samples the next token of each row of a step; adds to `deltas` what these add to their completions."""
        current = {row.sequence.seq_id for row in self._scheduler.complete(step.plan)}
        requests = self._requests
        for rows, group in outputs:
            # Those that are still there: a failure takes all completions of its request with it.
            indices = [
                index
                for index, row in enumerate(rows)
                if row.sequence.seq_id in current and row.sequence.seq_id in requests
            ]
            live = group if len(indices) == len(rows) else group.take(indices)
            sequences = [rows[index].sequence for index in indices]
            for sequence, choice in zip(sequences, _choose(live, sequences), strict=True):
                if sequence.removed:  # with another of its request's completions, a moment ago
                    continue
                request = requests[sequence.seq_id]
                delta = self._advance(request, sequence, choice)
                if delta is not None:
                    deltas.append((request, delta))

    def _advance(
        self, request: RequestState, sequence: Sequence, sampled: Choice | errors.StagecoachError
    ) -> OutputDelta | None:
        """Takes a sequence's next token; returns what it adds, None where there is no token."""
        counters = self._counters
        if isinstance(sampled, errors.StagecoachError):  # of this row alone
            self._owner.fail(request, sampled)
            return None
        if isinstance(sampled, InsufficientCandidates):
            sequence.next_want = wider_output(sequence.next_want, self._vocab_size)
            counters.num_repeats += 1
            self._scheduler.repeat(sequence)
            return None
        sequence.got_token()
        counters.completion_tokens += 1
        if not sequence.output_tokens:
            counters.looked_up_prompt_tokens += len(sequence.prompt_tokens)
            counters.cached_prompt_tokens += sequence.num_cached
        self._scheduler.append_token(sequence, sampled.token_id)
        try:
            delta = request.completions[sequence.index].advance(sampled)
        except Exception as error:  # a bug: the others' texts are not to suffer from it
            self._owner.fail(request, _unforeseen("detokenizing", sequence, error))
            return None
        if delta.finish_reason is not None:
            del self._requests[sequence.seq_id]
            self._scheduler.remove(sequence)
            counters.num_finished += 1
        return delta


def _choose(outputs: CandidateRows | WholeRows, sequences: list[Sequence]) -> list[Choice | errors.StagecoachError]:
    """The next tokens. A row whose token cannot be chosen, for whatever reason, gets an error and no other row does."""
    try:
        return [*choose_tokens(outputs, sequences)]
    except Exception:  # a bug: whose row it is shows when each is by itself
        return [_choose_one(outputs.take([index]), sequence) for index, sequence in enumerate(sequences)]


def _choose_one(output: CandidateRows | WholeRows, sequence: Sequence) -> Choice | errors.StagecoachError:
    try:
        [choice] = choose_tokens(output, [sequence])
    except Exception as error:
        return _unforeseen("sampling", sequence, error)
    return choice


def _unforeseen(doing: str, sequence: Sequence, error: Exception) -> errors.InternalError:
    logger.error("%s for sequence %d", doing, sequence.seq_id, exc_info=error)
    return errors.InternalError(f"{doing} has failed: {type(error).__name__}")
