"""The gRPC adapter of one shard: Describe, FetchFiles, Session and Forward.

A session opens a lease; the lease's micro-batches arrive on a Forward stream, run on the stage's compute thread, and go
on to the next stage, or, from the last stage, back to the router on the session.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from stagecoach import PROTOCOL_VERSION, __version__, errors
from stagecoach.channel import Dial, dial_plainly
from stagecoach.credits import CreditWindow
from stagecoach.forward_link import ForwardLink
from stagecoach.framing import FrameCounter, read_frame, write_frame
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_shard import wire
from stagecoach_shard.checkpoint import Checkpoint
from stagecoach_shard.lease import BlockRanges, Lease
from stagecoach_shard.session import LeaseSession, LoadReportDue, check_open
from stagecoach_shard.stage_runner import StageInput, StageResult, StageRunner, StepTimes

logger = logging.getLogger(__name__)

LOAD_REPORT_INTERVAL_S = 1.0
LINK_TIMEOUT_S = 10.0
FILE_CHUNK_BYTES = 1 << 20
# For who wants a lease of a shard that will be gone soon: another may take its place by then.
STOPPING_RETRY_AFTER_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]
# What goes back on a Forward stream: credits, at last the error that ends it, or None where the sender has ended it.
Credits = asyncio.Queue[int | errors.StagecoachError | None]


class ShardService:
    """Serves one stage. Lives on the event loop; the computing is the runner's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runner: StageRunner,
        *,
        block_size: int,
        num_blocks: int,
        kv_cache_bytes: int,
        max_batch_tokens: int,
        max_queued_steps: int,
        dial: Dial = dial_plainly,
    ) -> None:
        self._checkpoint = checkpoint
        self._runner = runner
        self._block_size = block_size
        self._kv_cache_bytes = kv_cache_bytes
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_steps = max_queued_steps
        self._dial = dial
        self._blocks = BlockRanges(num_blocks)
        self._sessions: dict[int, LeaseSession] = {}
        self._draining = False
        self._lease_ended = asyncio.Event()
        self._frames = FrameCounter()
        self._decode_s = 0.0
        self._encode_s = 0.0
        self._shard_id = secrets.token_hex(8)

    async def describe(self, request: shard_pb2.DescribeRequest, context: Context) -> shard_pb2.DescribeResponse:
        stage = self._runner.stage
        config = stage.config
        return shard_pb2.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            shard_id=self._shard_id,
            model=model_pb2.ModelDescription(
                name=self._checkpoint.name,
                family=config.family,
                fingerprint=self._checkpoint.fingerprint,
                num_layers=config.num_layers,
                hidden_size=config.hidden_size,
                vocab_size=config.vocab_size,
                context_length=config.context_length,
            ),
            layers=model_pb2.LayerRange(start=stage.layers.start, end=stage.layers.end),
            dtype=wire.DTYPES[stage.dtype],
            device=str(stage.device),
            block_size=self._block_size,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._num_free_blocks(request.lease_id),
            kv_cache_bytes=self._kv_cache_bytes,
            weights_bytes=stage.weights_bytes,
            max_batch_tokens=self._max_batch_tokens,
            pid=os.getpid(),
            hostname=socket.gethostname(),
            max_queued_steps=self._max_queued_steps,
            kernels="native" if stage.is_native else "torch",
        )

    async def fetch_files(
        self, request: shard_pb2.FetchFilesRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FileChunk]:
        for name, path in self._checkpoint.tokenizer_files().items():
            data = await asyncio.to_thread(path.read_bytes)
            for start in range(0, max(len(data), 1), FILE_CHUNK_BYTES):
                yield shard_pb2.FileChunk(name=name, data=data[start : start + FILE_CHUNK_BYTES])

    async def session(self, _: object, context: Context) -> None:
        """Opens the lease that the first request asks for, and holds it until either side ends the stream."""
        try:
            request = await context.read()
            if request is grpc.aio.EOF or request.WhichOneof("kind") != "open":
                raise errors.InvalidArgument("the first request of a session must be `open`", field="kind")
            session = self._open(request.open)
        except errors.StagecoachError as error:
            await errors.abort(context, error)
            return
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._connect(session, request.open.next_hop)
            await context.write(write_frame(shard_pb2.SessionResponse(opened=shard_pb2.OpenResponse())))
            # Apart from each other: a router that hangs reads nothing, and a write to it does not come back.
            ends = [asyncio.create_task(self._send(session, context)), asyncio.create_task(session.wait_for_silence())]
            tasks = [
                *ends,
                asyncio.create_task(self._watch(session, context)),
                asyncio.create_task(self._report_load_regularly(session)),
            ]
            ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        except errors.StagecoachError as error:
            await errors.abort(context, error)
        finally:
            for task in tasks:
                task.cancel()
            await self._close(session)

    async def forward(self, _: object, context: Context) -> None:
        """Takes micro-batches and gives credits back as their results move on."""
        outbox: Credits = asyncio.Queue()
        outbox.put_nowait(self._max_queued_steps)
        window = CreditWindow(self._max_queued_steps)
        reader = asyncio.create_task(self._read_micro_batches(context, outbox))
        try:
            while (item := await outbox.get()) is not None:
                if isinstance(item, errors.StagecoachError):
                    await errors.abort(context, item)
                if due := window.give_back(item):
                    await context.write(shard_pb2.ForwardResponse(credits=due))
        finally:
            reader.cancel()

    def drain(self) -> int:
        """Opens no lease from now on. Returns how many are open."""
        self._draining = True
        return len(self._sessions)

    async def leases_ended(self) -> None:
        """Returns when no lease is open."""
        while self._sessions:
            self._lease_ended.clear()
            await self._lease_ended.wait()

    def end_sessions(self) -> None:
        """Tells every router that this shard stops."""
        for session in list(self._sessions.values()):
            session.fail(errors.Unavailable("the shard is stopping"))
            session.outbox.put_nowait(None)

    async def _read_micro_batches(self, context: Context, outbox: Credits) -> None:
        try:
            while isinstance(data := await context.read(), bytes):
                self._accept(data, outbox)
            outbox.put_nowait(None)
        except errors.StagecoachError as error:
            outbox.put_nowait(error)
        except Exception as error:  # a bug: without this the sender would wait for ever
            logger.exception("reading micro-batches")
            outbox.put_nowait(errors.InternalError(f"the shard cannot read micro-batches: {error!r}"))

    def _open(self, request: shard_pb2.OpenRequest) -> LeaseSession:
        if self._draining:
            raise errors.Unavailable("the shard is stopping", retry_after_s=STOPPING_RETRY_AFTER_S)
        check_open(request, self._runner.stage, self._checkpoint.fingerprint, self._block_size)
        former = self._sessions.get(request.lease_id)
        if former is not None:
            if request.epoch <= former.lease.epoch:
                raise errors.StaleEpoch(
                    f"epoch {request.epoch}: this lease is already in epoch {former.lease.epoch}",
                    field="epoch",
                    limit=former.lease.epoch,
                    value=request.epoch,
                )
            self._release(former)
        first_block = self._blocks.allocate(request.num_blocks)
        try:
            lease = Lease(
                request.lease_id,
                request.epoch,
                first_block=first_block,
                num_blocks=request.num_blocks,
                block_size=self._block_size,
                max_slots=request.max_slots,
                context_length=self._checkpoint.config.context_length,
                max_batch_tokens=self._max_batch_tokens,
            )
        except errors.StagecoachError:
            self._blocks.free(first_block)
            raise
        session = LeaseSession(lease, request.silence_timeout_s)
        self._sessions[lease.lease_id] = session
        logger.info("lease %x opened: epoch %d, %d blocks", lease.lease_id, lease.epoch, lease.num_blocks)
        return session

    async def _connect(self, session: LeaseSession, next_hop: str) -> None:
        if not next_hop:
            return
        session.link = ForwardLink(next_hop, on_failure=session.fail, dial=self._dial)
        await session.link.open(LINK_TIMEOUT_S)

    async def _send(self, session: LeaseSession, context: Context) -> None:
        while (item := await session.outbox.get()) is not None:
            if isinstance(item, LoadReportDue):
                session.report_is_sent()
                item = self._load_report(item.number), None
            frame, on_sent = item
            await context.write(frame)
            if on_sent is not None:
                on_sent()

    async def _watch(self, session: LeaseSession, context: Context) -> None:
        """Answers what the router asks, until it ends its side."""
        while (request := await context.read()) is not grpc.aio.EOF:
            session.heard()
            if request.WhichOneof("kind") == "report_load":
                session.ask_for_report(request.report_load.number)
            else:
                session.fail(errors.InvalidArgument("a session is opened once", field="kind"))
        session.outbox.put_nowait(None)

    async def _report_load_regularly(self, session: LeaseSession) -> None:
        while True:
            session.ask_for_report()
            await asyncio.sleep(LOAD_REPORT_INTERVAL_S)

    def _load_report(self, number: int) -> bytes:
        load = self._runner.load
        report = shard_pb2.LoadReport(
            num_steps=load.num_steps,
            num_tokens=load.num_tokens,
            compute_s=load.compute_s,
            wait_s=load.wait_s,
            queue_s=load.queue_s,
            decode_s=self._decode_s,
            encode_s=self._encode_s,
            queue_depth=self._runner.queue_depth,
            num_fast_frames=self._frames.num_fast_frames,
            num_frames=self._frames.num_frames,
            number=number,
        )
        return write_frame(shard_pb2.SessionResponse(load=report))

    def _num_free_blocks(self, lease_id: int) -> int:
        """The most that a lease can have now, or that the lease `lease_id` can have when it is opened anew."""
        session = self._sessions.get(lease_id)
        return self._blocks.num_free_without(None if session is None else session.lease.first_block)

    def _release(self, session: LeaseSession) -> None:
        session.ended = True
        if self._sessions.get(session.lease.lease_id) is session:
            del self._sessions[session.lease.lease_id]
            self._lease_ended.set()
            self._blocks.free(session.lease.first_block)
        session.outbox.put_nowait(None)

    async def _close(self, session: LeaseSession) -> None:
        self._release(session)
        if session.link is not None:
            await session.link.close()
        logger.info("lease %x closed: epoch %d", session.lease.lease_id, session.lease.epoch)

    def _accept(self, data: bytes, credits: Credits) -> None:
        """Checks one micro-batch and gives it to the compute thread."""
        begin = time.perf_counter()
        message, payload = read_frame(shard_pb2.MicroBatch, data, self._frames)
        header = message.header
        session = self._session_of(header)
        if session.ended:
            return  # its router knows
        try:
            step = self._read_step(session, header, payload)
        except errors.StagecoachError as error:
            session.fail(error, header.step)
            raise
        loop = asyncio.get_running_loop()
        session.num_queued += 1

        def give_credit_back() -> None:
            session.num_queued -= 1
            credits.put_nowait(1)

        decode_s = time.perf_counter() - begin
        self._decode_s += decode_s

        def done(result: StageResult | BaseException | None, times: StepTimes) -> None:
            loop.call_soon_threadsafe(self._deliver, session, header, result, decode_s, times, give_credit_back)

        self._runner.submit(step, done)

    def _session_of(self, header: shard_pb2.MicroBatchHeader) -> LeaseSession:
        session = self._sessions.get(header.lease_id)
        if session is None:
            raise errors.StaleEpoch(
                f"lease {header.lease_id:x} is not open here", field="lease_id", value=f"{header.lease_id:x}"
            )
        if header.epoch != session.lease.epoch:  # a late one of an earlier epoch: no fault of the present one
            raise errors.StaleEpoch(
                f"epoch {header.epoch}: this lease is in epoch {session.lease.epoch}",
                field="epoch",
                limit=session.lease.epoch,
                value=header.epoch,
            )
        return session

    def _read_step(self, session: LeaseSession, header: shard_pb2.MicroBatchHeader, payload: memoryview) -> StageInput:
        """Checks a micro-batch of `session` and applies its block-table changes."""
        stage = self._runner.stage
        if header.first_layer != stage.layers.start:
            raise errors.InvalidArgument(
                f"first_layer: the payload goes into layer {header.first_layer}, this stage is {stage.layers}",
                field="first_layer",
                limit=stage.layers.start,
                value=header.first_layer,
            )
        if session.num_queued >= self._max_queued_steps:
            raise errors.InvalidArgument(
                "a micro-batch without credit",
                field="credits",
                limit=self._max_queued_steps,
                value=session.num_queued,
            )
        wire.check_timings(header.timings, stage.layers.start)
        rows = session.lease.accept(header)
        inputs, copied = wire.read_inputs(
            payload,
            header.dtype,
            num_tokens=rows.total_tokens,
            hidden_size=stage.config.hidden_size,
            dtype=None if stage.is_first else stage.dtype,
            vocab_size=stage.config.vocab_size,
        )
        if copied:
            self._frames.payload_was_copied()
        return StageInput(
            inputs=inputs,
            rows=rows,
            outputs=wire.read_wanted(header.outputs, rows.total_tokens, stage.config.vocab_size)
            if stage.is_last
            else [],
            is_current=lambda: not session.ended,
        )

    def _deliver(
        self,
        session: LeaseSession,
        header: shard_pb2.MicroBatchHeader,
        result: StageResult | BaseException | None,
        decode_s: float,
        times: StepTimes,
        on_sent: Callable[[], None],
    ) -> None:
        """Sends a finished step on. Its credit goes back upstream only when it has left."""
        if session.ended:
            return
        if result is None or isinstance(result, BaseException):
            session.fail(errors.ShardFault(f"step {header.step} failed: {result!r}"), header.step)
            return
        begin = time.perf_counter()
        wire.add_timing(header, decode_s, times)
        if isinstance(result, list):
            session.outbox.put_nowait((wire.write_result(header, result), on_sent))
        else:
            assert session.link is not None, "every stage but the last has a next hop"
            header.first_layer = self._runner.stage.layers.end
            session.link.send(wire.write_hidden_states(header, result), on_sent)
        self._encode_s += time.perf_counter() - begin
