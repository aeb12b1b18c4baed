"""One open pipeline: a session with every stage, and the stream of micro-batches into the first. Effects only.

What goes in and comes out is decided elsewhere; here it is sent, received, counted, and found broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.process.together import together
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.rpc.credits import usable_credits
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.rpc.message_limits import max_tokens_per_message
from stagecoach.v1 import shard_pb2
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.metrics.load_report import LoadReport
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.stage_session import OPEN_TIMEOUT_S, StageSession
from stagecoach_router.pipelines.watchdog import DEFAULT_LIMITS, FaultLimits, Watchdog

logger = logging.getLogger(__name__)

# A shard that hears nothing from us for so many times the fault timeout ends the lease: we have given it up by then.
SILENCE_PER_FAULT_TIMEOUT = 2.0


class PipelineListener(Protocol):
    """Who is told what comes of a pipeline."""

    def result_came(self, result: shard_pb2.StepResult, payload: memoryview) -> None:
        """The last stage has computed a step. Results come in the order of the steps.

        What this raises, the pipeline is lost by.
        """

    def pipeline_lost(self, error: errors.StagecoachError) -> None:
        """A part of it has broken, which was open. Told once, and nothing comes after it."""


# Opens a pipeline under an epoch that none had before.
Connect = Callable[[PipelineListener], Awaitable["Pipeline"]]


@dataclass(frozen=True, slots=True)
class PipelineContext:
    """What all of a router's pipelines have in common.

    lease_id: under which they are opened. totals: what they do is added to these. dial: how shards are connected to.
    faults: how long a stage may be silent, and a step under way.
    """

    lease_id: int
    totals: PipelineTotals = field(default_factory=PipelineTotals)
    dial: Dial = dial_plainly
    faults: FaultLimits = DEFAULT_LIMITS


class Pipeline:
    """The stages of one model, in order, opened under one lease and one epoch.

    It is lost when any part of it breaks, a stage hangs, or a step does not come back.
    """

    def __init__(
        self, shards: Sequence[ShardDescription], epoch: int, listener: PipelineListener, context: PipelineContext
    ) -> None:
        self.epoch = epoch
        self.lease_id = context.lease_id
        self.num_blocks = 0
        # Steps that may be in flight and wait for no credit anywhere.
        self.max_queued_steps = min(usable_credits(max(1, shard.facts.max_queued_steps)) for shard in shards)
        self.max_batch_tokens = min(max_step_tokens(shard.facts) for shard in shards)
        self.vocab_size: int = shards[0].facts.model.vocab_size
        self.lost: errors.StagecoachError | None = None
        self._is_open = False  # has been, at least
        self.stages = [StageSession(shard, self, context.totals.frames) for shard in shards]
        self._listener = listener
        self._context = context
        self._watchdog = Watchdog([shard.address for shard in shards], context.faults)
        self._num_questions = 0
        self._num_under_way = 0  # steps that were sent, and have not come back
        self._forward: ForwardLink | None = None  # into the first stage
        self._watching: asyncio.Task[None] | None = None

    async def open(self, *, num_blocks: int, max_slots: int) -> None:
        """Opens a session with every stage, then the stream into the first. Raises the first stage's typed error.

        Also where a stage breaks that was open already: the listener hears nothing of a pipeline that never was.
        """
        self.num_blocks = num_blocks
        next_hops = [stage.address for stage in self.stages[1:]] + [""]
        try:
            await together(
                stage.open(self._open_request(stage, next_hop, num_blocks, max_slots), self._context.dial)
                for stage, next_hop in zip(self.stages, next_hops, strict=True)
            )
            self._forward = ForwardLink(self.stages[0].address, on_failure=self._lose, dial=self._context.dial)
            await self._forward.open(OPEN_TIMEOUT_S)
            if self.lost is not None:
                raise self.lost
            self._is_open = True
            self._watching = asyncio.create_task(self._watch())
        except BaseException:
            await self.close()
            raise

    def send(self, frame: bytes, expected_s: float | None = None) -> None:
        """Queues a framed MicroBatch for the first stage; `expected_s` is what its whole way takes, where known."""
        assert self._forward is not None, "send before open"
        self._num_under_way += 1
        self._watchdog.sent(expected_s)
        self._forward.send(frame)

    async def refresh_loads(self, timeout_s: float) -> None:
        """Asks every stage for a load report of now, and waits until all have come, at the longest `timeout_s`.

        Returns at once where the pipeline is lost.
        """
        if self.lost is not None:
            return
        self._num_questions += 1
        question = self._num_questions
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await together(stage.load_report(question) for stage in self.stages)

    def give_up(self, error: errors.StagecoachError) -> None:
        """Whoever uses it has found it broken: it is lost."""
        self._lose(error)

    async def close(self) -> None:
        """Ends the lease on every stage."""
        self.lost = self.lost or errors.Unavailable("the pipeline is closed")
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._forward is not None:
            await self._forward.close()
        await asyncio.gather(*(stage.close() for stage in self.stages))

    def _open_request(
        self, stage: StageSession, next_hop: str, num_blocks: int, max_slots: int
    ) -> shard_pb2.OpenRequest:
        facts = stage.shard.facts
        return shard_pb2.OpenRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=facts.model.fingerprint,
            layers=facts.layers,
            dtype=facts.dtype,
            lease_id=self.lease_id,
            epoch=self.epoch,
            num_blocks=num_blocks,
            block_size=facts.block_size,
            max_slots=max_slots,
            next_hop=next_hop,
            silence_timeout_s=SILENCE_PER_FAULT_TIMEOUT * self._context.faults.fault_timeout_s,
        )

    async def _watch(self) -> None:
        """Watches until the pipeline is lost. It never just ends: nobody else would find a stage that hangs."""
        try:
            await self._ask_again_and_again()
        except Exception as error:
            logger.exception("watching a pipeline")
            self._lose(errors.InternalError(f"the watchdog failed: {error!r}"))

    async def _ask_again_and_again(self) -> None:
        """Asks every stage whether it is there, until the watchdog gives the pipeline up."""
        while self.lost is None:
            self._num_questions += 1
            finding = self._watchdog.look(time.monotonic(), self._num_questions)
            if finding is not None:
                named = [] if finding.address is None else [finding.address]
                self._lose(errors.Unavailable(finding.reason, addresses=named))
                return
            for stage in self.stages:
                stage.ask_for_load(self._num_questions)
            await asyncio.sleep(self._watchdog.interval_s)

    # ---- what the sessions tell

    def result_came(
        self, session: StageSession, result: shard_pb2.StepResult, payload: memoryview, message_bytes: int
    ) -> None:
        """Hands it on. Raises ShardFault for one that cannot be, as where the stage was not asked for any."""
        if self.lost is not None:
            return
        if session is not self.stages[-1] or not self._num_under_way:
            text = f"{session}: a result of step {result.step}, for which nobody has asked it"
            raise errors.ShardFault(text, field="step", value=result.step, addresses=[session.address])
        self._num_under_way -= 1
        check_timings(result, len(self.stages))
        self._context.totals.add_result(len(payload), message_bytes)
        self._watchdog.returned()
        self._listener.result_came(result, payload)

    def load_came(self, session: StageSession, report: LoadReport) -> None:
        """Adds it to the totals, and tells the watchdog."""
        self._context.totals.stage(session.address).add(session.shard.facts.shard_id, report.counters)
        self._watchdog.answered(session.address, report)

    def session_ended(self, error: errors.StagecoachError) -> None:
        """The pipeline is lost."""
        self._lose(error)

    def _lose(self, error: errors.StagecoachError) -> None:
        if self.lost is None:
            self.lost = error
            for stage in self.stages:
                stage.expect_no_load()
            if self._is_open:  # else `open` raises it
                self._listener.pipeline_lost(error)


def max_step_tokens(facts: shard_pb2.DescribeResponse) -> int:
    """Of how many tokens a step through this shard may be: what it takes, and what its messages carry."""
    return min(facts.max_batch_tokens, max_tokens_per_message(facts.model.hidden_size, facts.dtype))


def check_timings(result: shard_pb2.StepResult, num_stages: int) -> None:
    """Raises ShardFault for timings that a step through so many stages cannot have. None at all are let pass."""
    if len(result.timings) not in (0, num_stages):
        text = f"step {result.step}: {len(result.timings)} timings, {num_stages} stages"
        raise errors.ShardFault(text, field="timings", limit=num_stages, value=len(result.timings))
    for timing in result.timings:
        for seconds in (timing.decode_s, timing.queue_s, timing.compute_s):
            if not 0.0 <= seconds < math.inf:
                text = f"step {result.step}: a timing of {seconds} s"
                raise errors.ShardFault(text, field="timings", limit="[0, inf)", value=seconds)
