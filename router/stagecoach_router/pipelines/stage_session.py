"""The session with one stage of a pipeline: opens the lease on its shard, and reads what the shard sends."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import MAX_MESSAGE_BYTES, clean, from_status, from_trailing_metadata
from stagecoach.rpc.channel import Dial
from stagecoach.rpc.framing import MAX_ANSWER_HEADER_BYTES, FrameCounter, read_frame
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.topology import LayerRange
from stagecoach.v1 import shard_pb2
from stagecoach_router.metrics.load_report import LoadReport, read_load_report
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.tenants.rate_limit import TokenBucket

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 20.0
# Load reports that nobody asked for; a shard sends one a second. So many may also come at once.
MAX_UNASKED_REPORTS_A_MINUTE = 600

Call = grpc.aio.StreamStreamCall[shard_pb2.SessionRequest, bytes]


class SessionListener(Protocol):
    """Who is told what comes of a session."""

    def result_came(
        self, session: StageSession, result: shard_pb2.StepResult, payload: memoryview, message_bytes: int
    ) -> None:
        """The stage says that it has computed a step."""

    def load_came(self, session: StageSession, report: LoadReport) -> None:
        """The stage has said what it has done."""

    def session_ended(self, error: errors.StagecoachError) -> None:
        """It has broken, for the reason that is given. Nothing more comes of this session."""


class StageSession:
    """One stage of a pipeline. `frames` counts what is read."""

    def __init__(self, shard: ShardDescription, listener: SessionListener, frames: FrameCounter) -> None:
        assert shard.layers is not None, "a stage has layers"
        self.shard = shard
        self.layers: LayerRange = shard.layers
        self.queue_depth = 0  # of the latest load report
        self._listener = listener
        self._frames = frames
        self._channel: grpc.aio.Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._question = 0  # the latest request for a load report
        self._was_asked = asyncio.Event()
        self._unasked_reports = TokenBucket(MAX_UNASKED_REPORTS_A_MINUTE, time.monotonic())
        self._has_ended = False
        self._awaited_reports: dict[int, asyncio.Future[None]] = {}

    @property
    def address(self) -> str:
        return self.shard.address

    def __str__(self) -> str:
        return f"stage {self.layers} at {self.address}"

    async def open(self, request: shard_pb2.OpenRequest, dial: Dial) -> None:
        """Opens the lease. Raises what the shard refuses it with, Unavailable where it does not answer."""
        self._channel = dial(self.address)
        call = ShardStub(self._channel).session()
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                await call.write(shard_pb2.SessionRequest(open=request))
                data = await call.read()
        except TimeoutError:
            text = f"{self.address}: no answer to Open in {OPEN_TIMEOUT_S:g} s"
            raise errors.Unavailable(text, addresses=[self.address]) from None
        except asyncio.InvalidStateError:
            data = grpc.aio.EOF
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, self.address, names_peer=True) from error
        if data is grpc.aio.EOF:
            raise await self._why_ended(call)
        self._tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._ask(call))]

    async def close(self) -> None:
        """Ends the lease."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # What ended them knows their frames, and these the call, whose connection would wait for garbage collection.
        self._tasks.clear()
        if self._channel is not None:
            await self._channel.close()

    def ask_for_load(self, question: int) -> None:
        """Asks for a load report. Later questions have higher numbers."""
        self._question = question
        self._was_asked.set()

    async def load_report(self, question: int) -> None:
        """Asks for a load report, and returns when it has come, or will not come any more."""
        arrived = self._awaited_reports[question] = asyncio.get_running_loop().create_future()
        self.ask_for_load(question)
        try:
            await arrived
        finally:
            del self._awaited_reports[question]

    def expect_no_load(self) -> None:
        """The pipeline is lost: whoever waits for a load report waits in vain."""
        for arrived in self._awaited_reports.values():
            if not arrived.done():
                arrived.set_result(None)

    def take_load(self, report: LoadReport) -> None:
        """A load report has come."""
        self.queue_depth = report.queue_depth
        self._listener.load_came(self, report)
        for question, arrived in self._awaited_reports.items():
            if question <= report.number and not arrived.done():
                arrived.set_result(None)

    async def _ask(self, call: Call) -> None:
        """Asks whenever somebody wants to know. A task of its own: a write that is cancelled ends its call."""
        try:
            while True:
                await self._was_asked.wait()
                self._was_asked.clear()
                request = shard_pb2.ReportLoad(number=self._question)
                self._unasked_reports.take(-1, time.monotonic())
                await call.write(shard_pb2.SessionRequest(report_load=request))
        except (grpc.RpcError, asyncio.InvalidStateError):
            return  # the reader learns why
        except Exception as unforeseen:  # a bug: without this the shard would seem to be silent
            logger.exception("asking %s", self.address)
            self._end(errors.InternalError(f"{self}: {unforeseen!r}", addresses=[self.address]))

    async def _read(self, call: Call) -> None:
        error: errors.StagecoachError
        try:
            while isinstance(data := await call.read(), bytes) and not self._has_ended:
                self._take(data)
            error = await self._why_ended(call)
        except grpc.RpcError as rpc_error:
            error = errors.from_rpc_error(rpc_error, self.address)
        except errors.StagecoachError as typed:
            error = typed.with_traceback(None)  # whose frames know the call; whoever keeps the error would keep that
        except Exception as unforeseen:  # a bug, here or there: without this the streams would wait for ever
            logger.exception("reading from %s", self.address)
            error = errors.ShardFault(f"{self}: {unforeseen!r}", addresses=[self.address])
        self._end(error)

    def _end(self, error: errors.StagecoachError) -> None:
        """It has broken, as the reader or the writer has found: it is told once."""
        if not self._has_ended:
            self._has_ended = True
            self._listener.session_ended(error)

    def _take(self, data: bytes) -> None:
        """Hands a message on. Raises the fault that it reports, and typed errors for one that cannot be."""
        try:
            message, payload = read_frame(shard_pb2.SessionResponse, data, self._frames, MAX_ANSWER_HEADER_BYTES)
        except errors.InvalidArgument as error:
            raise errors.ShardFault(
                f"{self}: {error}", field=error.field, limit=error.limit, value=error.value, addresses=[self.address]
            ) from error
        kind = message.WhichOneof("kind")
        if kind == "result":
            self._listener.result_came(self, message.result, payload, len(data))
        elif kind == "load":
            self._count_report(time.monotonic())
            self.take_load(read_load_report(message.load))
        elif kind == "fault":
            raise read_fault(message.fault, self)

    def _count_report(self, now_s: float) -> None:
        """Raises ShardFault for one too many: each takes time of the loop on which everything else runs."""
        if self._unasked_reports.wait_s(now_s):
            limit = MAX_UNASKED_REPORTS_A_MINUTE
            text = f"{self}: more than {limit} load reports a minute that nobody asked for"
            raise errors.ShardFault(text, field="load", limit=limit, addresses=[self.address])
        self._unasked_reports.take(1, now_s)

    async def _why_ended(self, call: Call) -> errors.StagecoachError:
        """The error behind a session that the shard has ended."""
        code = await call.code()
        detailed = from_trailing_metadata(await call.trailing_metadata())
        if detailed is not None:
            detailed.message = f"{self.address}: {detailed.message}"
            detailed.args = (detailed.message,)
            # The one that says so is among them, whomever else it names.
            detailed.addresses = tuple(dict.fromkeys((self.address, *detailed.addresses)))
            return detailed
        details = clean(await call.details() or "", MAX_MESSAGE_BYTES)
        text = f"{self.address}: the session ended ({code.name}: {details})"
        return errors.Unavailable(text, addresses=[self.address])


def read_fault(fault: shard_pb2.Fault, stage: StageSession) -> errors.ShardFault | errors.ShardStopping:
    """A fault is about the stage that reports it and whom that names: its next hop, where their link has broken.

    A stage that says that it stops is no fault of what it computes, so that is told apart.
    """
    cause = from_status(fault.status)
    named = () if cause is None else cause.addresses
    message = clean(fault.status.message, MAX_MESSAGE_BYTES)
    kind = errors.ShardStopping if isinstance(cause, errors.ShardStopping) else errors.ShardFault
    return kind(f"{stage}: {message}", addresses=[stage.address, *named])
