"""One pipeline through all its epochs, and the requests that are assigned to it.

Everything runs on one event loop, driven by events: a request, a result or a cancellation changes the scheduler's
state, then `dispatch` sends every step that has become possible. When the pipeline is lost, all sequences go back to
waiting with their token logs; they go on where the engine takes them, or here when a pipeline is open again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Protocol

from stagecoach import errors
from stagecoach.v1 import shard_pb2
from stagecoach_router.engine.assigned_requests import AssignedRequests
from stagecoach_router.engine.health_probe import HealthProbe
from stagecoach_router.engine.poison_detector import PoisonDetector
from stagecoach_router.engine.step_loop import StepLoop
from stagecoach_router.engine.straggler import StragglerDetector
from stagecoach_router.metrics.counters import Counters
from stagecoach_router.pipelines.pipeline import Connect, Pipeline
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.scheduling.pacing import Pacing
from stagecoach_router.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

REOPEN_FIRST_DELAY_S = 0.1
REOPEN_MAX_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What all replicas of a router have in common.

    `max_batch_tokens` is taken where all shards take so many; `recovery_timeout_s` is how long requests wait for a lost
    pipeline before they fail; `lanes` is Pacing's, `straggler_window_s` StragglerDetector's.
    """

    max_batch_tokens: int
    recovery_timeout_s: float
    straggler_window_s: float
    lanes: int = 0


class Owner(Protocol):
    """Who has the replicas, and is told of what concerns more than one of them."""

    @property
    def counters(self) -> Counters:
        """To which is added what they do."""

    def replica_changed(self, replica: Replica) -> None:
        """Its `ready` has changed, or it still has no pipeline through which tokens come."""

    def work_changed(self) -> None:
        """Another number of sequences may run."""

    def find_room(self, replica: Replica, request: RequestState) -> None:
        """Its pipeline has come back with too little room for this. To be moved, or failed."""


class Replica(AssignedRequests):
    """Generates over one pipeline at a time.

    `connect` opens it; `probe` says when to try it without a request. It is `ready` once a token has come through the
    pipeline, until that is lost.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        settings: ReplicaSettings,
        *,
        connect: Connect,
        probe: HealthProbe,
        owner: Owner,
    ) -> None:
        super().__init__(scheduler, owner.counters)
        self.pipeline: Pipeline | None = None  # the one it had last, where that is lost
        self.ready = False
        self.reason = "it has not been open yet"  # why it is not ready
        self._settings = settings
        self._connect = connect
        self._probe = probe
        self._owner = owner
        self._poison = PoisonDetector()
        self._steps: StepLoop | None = None  # of the pipeline; None once that is lost
        self._lost = asyncio.Event()
        self._unproven_since_s: float | None = time.monotonic()  # None while it is ready
        self._reopen_delay_s = REOPEN_FIRST_DELAY_S
        self._no_attempt_before_s = 0.0  # of time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether steps can be sent, though none may have come back yet."""
        return self._steps is not None

    @property
    def token_s(self) -> float | None:
        """What a sequence's next token takes where it is alone. None: not known yet."""
        return None if self.scheduler.pacing is None else self.scheduler.pacing.token_s()

    @property
    def unproven_s(self) -> float:
        """For how long it has had no pipeline through which tokens come; 0 where it has."""
        return 0.0 if self._unproven_since_s is None else time.monotonic() - self._unproven_since_s

    def dispatch(self) -> None:
        """Sends every step that can go now."""
        if self._steps is not None:
            self._steps.send_all()
        self._owner.work_changed()

    # ---- the pipeline

    async def open(self) -> None:
        """Opens a pipeline, and goes on with what waits. Raises what `connect` raises."""
        self._lost.clear()
        self.pipeline = await self._connect(self)
        try:
            self._fit(self.pipeline)
            if self.pipeline.lost is None:
                self._steps = self._begin(self.pipeline)
                self._steps.send_probe()
                self.reason = "no token has come through it yet"
            self.dispatch()
        except Exception as error:
            self._give_up(error)
            await self.close()
            raise

    async def run(self) -> None:
        """Brings the pipeline back whenever it is lost, and tries it while it idles. Runs until cancelled.

        An error that nobody foresaw costs this pipeline, which is opened again like any that is lost.
        """
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._reopen_whenever_lost())
                    tasks.create_task(self._prove_regularly())
            except* Exception as group:
                logger.exception("an error that nobody foresaw costs a pipeline")
                self._give_up(group.exceptions[0])
                self._lost.set()

    async def close(self) -> None:
        """Closes the pipeline."""
        if self.pipeline is not None:
            await self.pipeline.close()

    def _fit(self, pipeline: Pipeline) -> None:
        """Sets the scheduler's limits to what the smallest stage of the pipeline can hold."""
        scheduler = self.scheduler
        max_batch_tokens = min(self._settings.max_batch_tokens, pipeline.max_batch_tokens)
        if max_batch_tokens < min(self._settings.max_batch_tokens, scheduler.max_batch_tokens):
            text = "max-batch-tokens: %d; a step has %d at most, as the shards and their messages take no more"
            logger.warning(text, self._settings.max_batch_tokens, max_batch_tokens)
        scheduler.max_batch_tokens = max_batch_tokens
        scheduler.blocks.reset(pipeline.num_blocks - 1)  # the last one is the probe's
        scheduler.pacing = Pacing(len(pipeline.stages), self._settings.lanes)
        scheduler.pacing.limit_lanes(pipeline.max_queued_steps)
        scheduler.pacing.limit_steps(scheduler.max_logit_rows, scheduler.max_batch_tokens)
        for request in self.requests:
            if not self.fits(request):
                self._owner.find_room(self, request)

    def _begin(self, pipeline: Pipeline) -> StepLoop:
        pacing = self.scheduler.pacing
        assert pacing is not None, "fitted"
        self._probe.forget()
        return StepLoop(
            pipeline,
            self.scheduler,
            self._requests,
            self._probe,
            StragglerDetector(pacing, self._settings.straggler_window_s),
            self,
        )

    async def _reopen_whenever_lost(self) -> None:
        while True:
            await self._lost.wait()
            await self._reopen()

    async def _reopen(self) -> None:
        """Opens a pipeline again; requests fail once that has taken too long, and the attempts go on."""
        await self.close()
        self._fail_after_timeout()  # it may open well each time, and break with its probe
        while True:
            # So long after the last attempt began, also where that opened well and broke with its first step. A
            # pipeline that has lived for longer is opened again at once.
            await asyncio.sleep(self._no_attempt_before_s - time.monotonic())
            tried = time.monotonic()
            self._no_attempt_before_s = tried + self._reopen_delay_s
            self._reopen_delay_s = min(2 * self._reopen_delay_s, REOPEN_MAX_DELAY_S)
            try:
                await self.open()
            except Exception as error:
                unforeseen = not isinstance(error, errors.StagecoachError)
                logger.warning("pipeline not back yet: %s", error, exc_info=unforeseen)
                if time.monotonic() - tried >= self._reopen_delay_s:  # it has waited by itself, for shards
                    self._reopen_delay_s = REOPEN_FIRST_DELAY_S
                self.reason = f"{error!r}" if unforeseen else str(error)
                self._owner.replica_changed(self)  # it may be time to let go of what it kept
                self._fail_after_timeout()
                continue
            return

    def _fail_after_timeout(self) -> None:
        """Fails all requests if no token has come through any pipeline for too long."""
        if self.unproven_s > self._settings.recovery_timeout_s:
            text = f"the pipeline is lost: {self.reason}"
            self.fail_all(errors.Unavailable(text, retry_after_s=REOPEN_MAX_DELAY_S))
            self._owner.work_changed()

    def result_came(self, result: shard_pb2.StepResult, payload: memoryview) -> None:
        """A step has come back. What this raises, the pipeline is lost by."""
        assert self._steps is not None, "nothing is delivered after the loss"
        self._steps.take(result, payload)
        self._owner.work_changed()

    def token_came(self, *, is_probe: bool) -> None:
        """The pipeline works; `is_probe`: for what is nobody's, at least."""
        if not (is_probe and self._requests):  # a probe proves nothing about requests that break the pipeline
            self._reopen_delay_s = REOPEN_FIRST_DELAY_S
        self._set_ready(True)

    def pipeline_lost(self, error: errors.StagecoachError) -> None:
        """Puts every sequence back to waiting, and has `run` open a pipeline again."""
        logger.warning("pipeline lost: %s", error)
        self.reason = str(error)
        steps, self._steps = self._steps, None
        self._lost.set()  # first: whatever the rest comes to, it is opened again
        self._say_ready(False)
        poison = None
        if not isinstance(error, errors.ShardStopping):  # who says that it stops would have, whatever it computed
            poison = self._poison.pipeline_lost({} if steps is None else steps.under_way(), time.monotonic())
        if poison is not None:
            num_losses = poison.num_losses_alone
            text = f"the pipeline was lost {num_losses} times while it computed this request alone: {error}"
            logger.error("request %s fails: %s", poison.request.request_id, text)
            self.fail(poison, errors.ShardFault(text))
        self.scheduler.preempt_all()
        self._owner.work_changed()
        self._owner.replica_changed(self)  # also where it never was: requests may be here all the same

    def _give_up(self, error: BaseException) -> None:
        """Has the pipeline be lost by an error that nobody foresaw. What that has left behind may raise more."""
        if self.pipeline is None or self.pipeline.lost is not None:
            return
        try:
            self.pipeline.give_up(errors.InternalError(f"an error that nobody foresaw: {error!r}"))
        except Exception:
            logger.exception("giving up a pipeline")

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self._say_ready(ready)
            self._owner.replica_changed(self)

    def _say_ready(self, ready: bool) -> None:
        if ready:
            self._unproven_since_s = None
        elif self._unproven_since_s is None:
            self._unproven_since_s = time.monotonic()
        self.ready = ready

    # ---- the probe

    async def _prove_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._probe.interval_s / 4)
            self._prove()

    def _prove(self) -> None:
        """Where no token has come for a while and none is under way: sends a probe."""
        if self._steps is not None and not self.ready:
            self._owner.replica_changed(self)  # requests may have waited for it long enough
        if self._steps is None or not self._probe.is_due(time.perf_counter()):
            return
        self.dispatch()
        if self._steps.num_in_flight:
            return
        if self.scheduler.has_work():  # then a probe's token would prove nothing
            self.reason = "sequences wait, and nothing can be scheduled"
            if self.ready:
                logger.error(self.reason)
            self._set_ready(False)
            return
        self._steps.send_probe()
