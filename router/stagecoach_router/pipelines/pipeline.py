"""One open pipeline: a session with every stage, and the stream of micro-batches into the first. Effects only.

What goes in and comes out is decided elsewhere; here it is sent, received, counted, and found broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.errors.status import from_status
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.rpc.credits import usable_credits
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.rpc.framing import read_frame
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.v1 import shard_pb2
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.metrics.load_report import LoadReport, read_load_report
from stagecoach_router.pipelines.shard_client import Stage
from stagecoach_router.pipelines.watchdog import DEFAULT_LIMITS, FaultLimits, Watchdog

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 20.0
# A shard that hears nothing from us for so many times the fault timeout ends the lease: we have given it up by then.
SILENCE_PER_FAULT_TIMEOUT = 2.0

ResultHandler = Callable[[shard_pb2.StepResult, memoryview], None]
LostHandler = Callable[[errors.StagecoachError], None]
Session = grpc.aio.StreamStreamCall[shard_pb2.SessionRequest, bytes]
# Opens a pipeline under an epoch that none had before: (on_result, on_lost).
Connect = Callable[[ResultHandler, LostHandler], Awaitable["Pipeline"]]


class Pipeline:
    """The stages of one model, opened under one lease and one epoch.

    `on_result` gets the last stage's results in the order of the steps. `on_lost` is called once when any part breaks;
    nothing is delivered after it. What the pipeline does is added to `totals`. A stage that hangs and a step that does
    not come back break it, too, within what `faults` allows them.
    """

    def __init__(
        self,
        stages: list[Stage],
        *,
        lease_id: int,
        epoch: int,
        on_result: ResultHandler,
        on_lost: LostHandler,
        totals: PipelineTotals,
        dial: Dial = dial_plainly,
        faults: FaultLimits = DEFAULT_LIMITS,
    ) -> None:
        self.stages = stages
        self.epoch = epoch
        self.num_blocks = 0
        # Steps that may be in flight and wait for no credit anywhere.
        self.max_queued_steps = min(usable_credits(max(1, stage.description.max_queued_steps)) for stage in stages)
        self.max_batch_tokens = min(stage.description.max_batch_tokens for stage in stages)
        self.lease_id = lease_id
        self.totals = totals
        self.lost: errors.StagecoachError | None = None
        self._num_report_requests = 0
        self._on_result = on_result
        self._on_lost = on_lost
        self._faults = faults
        self._watchdog = Watchdog([stage.address for stage in stages], faults)
        self._dial = dial
        self._link: ForwardLink | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, *, num_blocks: int, max_slots: int) -> None:
        """Opens a session with every stage, then the stream into the first. Raises the first stage's typed error."""
        self.num_blocks = num_blocks
        try:
            await asyncio.gather(
                *(self._open_session(index, num_blocks, max_slots) for index in range(len(self.stages)))
            )
            self._link = ForwardLink(self.stages[0].address, on_failure=self._lose, dial=self._dial)
            await self._link.open(OPEN_TIMEOUT_S)
            self._tasks.append(asyncio.create_task(self._watch()))
        except BaseException:
            await self.close()
            raise

    def send(self, frame: bytes, expected_s: float | None = None) -> None:
        """Queues a framed MicroBatch for the first stage; `expected_s` is what its whole way takes, where known."""
        assert self._link is not None, "send before open"
        self._watchdog.sent(expected_s)
        self._link.send(frame)

    async def refresh_loads(self, timeout_s: float) -> None:
        """Asks every stage for a load report of now, and waits until all have come, at the longest `timeout_s`."""
        self._num_report_requests += 1
        number = self._num_report_requests
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(self._refresh_load(stage, number) for stage in self.stages))

    async def _refresh_load(self, stage: Stage, number: int) -> None:
        if self.lost is not None:
            return
        arrived = stage.reports[number] = asyncio.get_running_loop().create_future()
        stage.report_wanted.set()
        try:
            await arrived
        finally:
            del stage.reports[number]

    async def _ask_for_loads(self, stage: Stage, call: Session) -> None:
        """Asks whenever somebody wants to know. A task of its own: a write that is cancelled ends its call."""
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the reader learns why
            while True:
                await stage.report_wanted.wait()
                stage.report_wanted.clear()
                request = shard_pb2.ReportLoad(number=self._num_report_requests)
                await call.write(shard_pb2.SessionRequest(report_load=request))

    async def _watch(self) -> None:
        """Asks every stage again and again whether it is there, until the watchdog gives the pipeline up."""
        while self.lost is None:
            self._num_report_requests += 1
            finding = self._watchdog.look(time.monotonic(), self._num_report_requests)
            if finding is not None:
                named = [] if finding.address is None else [finding.address]
                self._lose(errors.Unavailable(finding.reason, addresses=named))
                return
            for stage in self.stages:
                stage.report_wanted.set()
            await asyncio.sleep(self._watchdog.interval_s)

    def _take_load(self, stage: Stage, report: LoadReport) -> None:
        stage.queue_depth = report.queue_depth
        self.totals.stage(stage.address).add(stage.description.shard_id, report.counters)
        self._watchdog.answered(stage.address, report)
        for number, arrived in stage.reports.items():
            if number <= report.number and not arrived.done():
                arrived.set_result(None)

    async def close(self) -> None:
        """Ends the lease on every stage."""
        self.lost = self.lost or errors.Unavailable("the pipeline is closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # What ended them knows their frames, and these the calls, whose connections would wait for garbage collection.
        self._tasks.clear()
        if self._link is not None:
            await self._link.close()
        await asyncio.gather(*(stage.channel.close() for stage in self.stages if stage.channel is not None))

    async def _open_session(self, index: int, num_blocks: int, max_slots: int) -> None:
        stage = self.stages[index]
        description = stage.description
        stage.channel = self._dial(stage.address)
        call = ShardStub(stage.channel).session()
        request = shard_pb2.OpenRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=description.model.fingerprint,
            layers=description.layers,
            dtype=description.dtype,
            lease_id=self.lease_id,
            epoch=self.epoch,
            num_blocks=num_blocks,
            block_size=description.block_size,
            max_slots=max_slots,
            next_hop=self.stages[index + 1].address if index + 1 < len(self.stages) else "",
            silence_timeout_s=SILENCE_PER_FAULT_TIMEOUT * self._faults.fault_timeout_s,
        )
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await call.write(shard_pb2.SessionRequest(open=request))
                data = await call.read()
        except TimeoutError:
            text = f"{stage.address}: no answer to Open in {OPEN_TIMEOUT_S:g} s"
            raise errors.Unavailable(text, addresses=[stage.address]) from None
        except asyncio.InvalidStateError:
            data = grpc.aio.EOF
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, stage.address) from error
        if data is grpc.aio.EOF:
            raise await _why_ended(call, stage.address)
        self._tasks += [
            asyncio.create_task(self._read(stage, call)),
            asyncio.create_task(self._ask_for_loads(stage, call)),
        ]

    async def _read(self, stage: Stage, call: Session) -> None:
        try:
            while isinstance(data := await call.read(), bytes):
                message, payload = read_frame(shard_pb2.SessionResponse, data, self.totals.frames)
                kind = message.WhichOneof("kind")
                if kind == "result" and self.lost is None:
                    check_timings(message.result, len(self.stages))
                    self.totals.add_result(len(payload), len(data))
                    self._watchdog.returned()
                    self._on_result(message.result, payload)
                elif kind == "load":
                    self._take_load(stage, read_load_report(message.load))
                elif kind == "fault":
                    self._lose(_read_fault(message.fault, stage))
            error: errors.StagecoachError = await _why_ended(call, stage.address)
        except grpc.RpcError as rpc_error:
            error = errors.from_rpc_error(rpc_error, stage.address)
        except errors.StagecoachError as typed:
            error = typed
        except Exception as unforeseen:  # a bug, here or there: without this the streams would wait for ever
            logger.exception("reading from %s", stage.address)
            text = f"stage {stage.layers} at {stage.address}: {unforeseen!r}"
            error = errors.ShardFault(text, addresses=[stage.address])
        self._lose(error)

    def _lose(self, error: errors.StagecoachError) -> None:
        if self.lost is None:
            self.lost = error
            self._on_lost(error)


def check_timings(result: shard_pb2.StepResult, num_stages: int) -> None:
    """Raises ShardFault for timings that a step through so many stages cannot have. None at all are let pass."""
    if len(result.timings) not in (0, num_stages):
        raise errors.ShardFault(
            f"step {result.step}: {len(result.timings)} timings, {num_stages} stages",
            field="timings",
            limit=num_stages,
            value=len(result.timings),
        )
    for timing in result.timings:
        for seconds in (timing.decode_s, timing.queue_s, timing.compute_s):
            if not 0.0 <= seconds < math.inf:
                raise errors.ShardFault(
                    f"step {result.step}: a timing of {seconds} s", field="timings", limit="[0, inf)", value=seconds
                )


def _read_fault(fault: shard_pb2.Fault, stage: Stage) -> errors.ShardFault:
    """It is about the stage that reports it, and about whom that names: its next hop, where their link has broken."""
    cause = from_status(fault.status)
    text = f"stage {stage.layers} at {stage.address}: {fault.status.message}"
    return errors.ShardFault(text, addresses=[stage.address, *(() if cause is None else cause.addresses)])


async def _why_ended(call: Session, address: str) -> errors.StagecoachError:
    """The error behind a session that the shard has ended."""
    code = await call.code()
    detailed = errors.from_trailing_metadata(await call.trailing_metadata())
    if detailed is not None:
        detailed.addresses = detailed.addresses or (address,)
        return detailed
    text = f"{address}: the session ended ({code.name}: {await call.details()})"
    return errors.Unavailable(text, addresses=[address])
