"""A Session stream: opens a router's lease, holds it, and carries results, faults and load reports to the router."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.rpc.channel import Dial
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.rpc.framing import write_frame
from stagecoach.v1 import shard_pb2
from stagecoach_shard.leases.assignment import Assignment
from stagecoach_shard.leases.served_stage import ServedStage
from stagecoach_shard.leases.session import LeaseSession, LoadReportDue

logger = logging.getLogger(__name__)

LOAD_REPORT_INTERVAL_S = 1.0
LINK_TIMEOUT_S = 10.0

Context = grpc.aio.ServicerContext[Any, Any]


async def serve_session(assignment: Assignment, dial: Dial, context: Context) -> None:
    """Opens the lease that the first request asks for, and holds it until either side ends the stream."""
    try:
        request = await _read(context)
        if request is None or request.WhichOneof("kind") != "open":
            raise errors.InvalidArgument("the first request of a session must be `open`", field="kind")
        assignment.check_available()
        stage = assignment.served()
        session = stage.open(request.open)
    except errors.StagecoachError as error:
        await abort(context, error)
        return
    tasks: list[asyncio.Task[None]] = []
    try:
        await _connect(session, request.open.next_hop, dial)
        await context.write(write_frame(shard_pb2.SessionResponse(opened=shard_pb2.OpenResponse())))
        # Apart from each other: a router that hangs reads nothing, and a write to it does not come back.
        ends = [
            asyncio.create_task(_send(stage, session, context)),
            asyncio.create_task(session.wait_for_silence()),
        ]
        tasks = [
            *ends,
            asyncio.create_task(_watch(session, context)),
            asyncio.create_task(_report_load_regularly(session)),
        ]
        ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    except errors.StagecoachError as error:
        await abort(context, error)
    finally:
        for task in tasks:
            task.cancel()
        stage.release(session)
        if session.link is not None:
            await session.link.close()
        logger.info("lease %x closed: epoch %d", session.lease.lease_id, session.lease.epoch)


async def _read(context: Context) -> shard_pb2.SessionRequest | None:
    """The next request; None where the router has ended its side. Raises InvalidArgument for what is none."""
    try:
        request = await context.read()
    except DecodeError as error:
        raise errors.InvalidArgument(f"not a request of a session: {error}", field="kind") from error
    return request if isinstance(request, shard_pb2.SessionRequest) else None


async def _connect(session: LeaseSession, next_hop: str, dial: Dial) -> None:
    if not next_hop:
        return
    session.link = ForwardLink(next_hop, on_failure=session.fail, dial=dial)
    await session.link.open(LINK_TIMEOUT_S)


async def _send(stage: ServedStage, session: LeaseSession, context: Context) -> None:
    while (item := await session.outbox.get()) is not None:
        if isinstance(item, LoadReportDue):
            session.report_is_sent()
            item = stage.load_report(session, item.number), None
        frame, on_sent = item
        await context.write(frame)
        if on_sent is not None:
            on_sent()


async def _watch(session: LeaseSession, context: Context) -> None:
    """Answers what the router asks, until it ends its side, or asks what makes no sense."""
    try:
        while (request := await _read(context)) is not None:
            if request.WhichOneof("kind") != "report_load":
                raise errors.InvalidArgument("a session is opened once", field="kind")
            session.asked_for_report(request.report_load.number)
        session.outbox.put_nowait(None)
    except errors.StagecoachError as error:
        session.fail(error)
    except Exception as error:  # a bug: without this nobody would hear the router any more
        logger.exception("reading a session")
        session.fail(errors.InternalError(f"the shard cannot read the session: {error!r}"))


async def _report_load_regularly(session: LeaseSession) -> None:
    while True:
        session.ask_for_report()
        await asyncio.sleep(LOAD_REPORT_INTERVAL_S)
