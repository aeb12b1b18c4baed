"""A Forward stream: micro-batches come in, run on the stage's compute thread, and go on.

The last stage sends results back to the router, on the router's session; every other one sends hidden states to the
next stage.

A stream may outlive the leases whose micro-batches it brought, and the stage that computed them. So for each
micro-batch it asks anew which stage there is, and keeps a reference to none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.rpc.credits import CreditWindow
from stagecoach.rpc.framing import read_frame
from stagecoach.v1 import shard_pb2
from stagecoach_shard.leases import wire
from stagecoach_shard.leases.assignment import Assignment
from stagecoach_shard.leases.served_stage import ServedStage
from stagecoach_shard.leases.session import LeaseSession
from stagecoach_shard.runtime.load_meter import StepTimes
from stagecoach_shard.runtime.stage_runner import StageInput, StageResult

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# What is to go back on a Forward stream: credits; or an error, which ends it; or None, when the sender has ended it.
Credits = asyncio.Queue[int | errors.StagecoachError | None]


async def serve_forward(assignment: Assignment, max_queued_steps: int, context: Context) -> None:
    """Takes micro-batches and gives credits back as their results move on."""
    try:
        assignment.served()
    except errors.StagecoachError as error:
        await abort(context, error)
    outbox: Credits = asyncio.Queue()
    outbox.put_nowait(max_queued_steps)
    window = CreditWindow(max_queued_steps)
    reader = asyncio.create_task(_read_micro_batches(assignment, context, outbox))
    try:
        while (item := await outbox.get()) is not None:
            if isinstance(item, errors.StagecoachError):
                await abort(context, item)
            if due := window.give_back(item):
                await context.write(shard_pb2.ForwardResponse(credits=due))
    finally:
        reader.cancel()


async def _read_micro_batches(assignment: Assignment, context: Context, outbox: Credits) -> None:
    try:
        while isinstance(data := await context.read(), bytes):
            accept(assignment.served(), data, outbox)
        outbox.put_nowait(None)
    except errors.StagecoachError as error:
        outbox.put_nowait(error)
    except Exception as error:  # a bug: without this the sender would wait for ever
        logger.exception("reading micro-batches")
        outbox.put_nowait(errors.InternalError(f"the shard cannot read micro-batches: {error!r}"))


def accept(stage: ServedStage, data: bytes, credits: Credits) -> None:
    """Checks one micro-batch and gives it to the compute thread. Raises what is wrong with it."""
    begin = time.perf_counter()
    message, payload = read_frame(shard_pb2.MicroBatch, data, stage.frames)
    header = message.header
    session = stage.session_of(header)
    if session.ended:
        return  # its router knows
    try:
        step = read_step(stage, session, header, payload)
    except errors.StagecoachError as error:
        session.fail(error, header.step)
        raise
    loop = asyncio.get_running_loop()
    session.num_queued += 1

    def give_credit_back() -> None:
        session.num_queued -= 1
        credits.put_nowait(1)

    def done(result: StageResult | Exception | None, times: StepTimes) -> None:
        loop.call_soon_threadsafe(_deliver, stage, session, header, result, times, give_credit_back)

    stage.runner.submit(step, done, decode_s=time.perf_counter() - begin)


def read_step(
    stage: ServedStage, session: LeaseSession, header: shard_pb2.MicroBatchHeader, payload: memoryview
) -> StageInput:
    """Checks a micro-batch of `session` and applies its block-table changes."""
    weights = stage.runner.stage
    if header.first_layer != weights.layers.start:
        raise errors.InvalidArgument(
            f"first_layer: the payload goes into layer {header.first_layer}, this stage is {weights.layers}",
            field="first_layer",
            limit=weights.layers.start,
            value=header.first_layer,
        )
    if session.num_queued >= stage.limits.max_queued_steps:
        raise errors.InvalidArgument(
            "a micro-batch without credit",
            field="credits",
            limit=stage.limits.max_queued_steps,
            value=session.num_queued,
        )
    wire.check_timings(header.timings, weights.layers.start)
    batch = session.lease.accept(header)
    inputs, copied = wire.read_inputs(
        payload,
        header.dtype,
        num_tokens=batch.total_tokens,
        hidden_size=weights.config.hidden_size,
        dtype=None if weights.is_first else weights.dtype,
        vocab_size=weights.config.vocab_size,
    )
    if copied:
        stage.frames.payload_was_copied()
    return StageInput(
        inputs=inputs,
        batch=batch,
        outputs=wire.read_wanted(header.outputs, batch.total_tokens, weights.config.vocab_size)
        if weights.is_last
        else [],
        is_current=lambda: not session.ended,
        load=session.load,
    )


def _deliver(
    stage: ServedStage,
    session: LeaseSession,
    header: shard_pb2.MicroBatchHeader,
    result: StageResult | Exception | None,
    times: StepTimes,
    on_sent: Callable[[], None],
) -> None:
    """Sends a finished step on. Its credit goes back upstream only when it has left."""
    if session.ended:
        return
    if result is None or isinstance(result, Exception):
        session.fail(errors.ShardFault(f"step {header.step} failed: {result!r}"), header.step)
        return
    begin = time.perf_counter()
    wire.add_timing(header, times)
    if isinstance(result, list):
        session.outbox.put_nowait((wire.write_result(header, result), on_sent))
    else:
        assert session.link is not None, "every stage but the last has a next hop"
        header.first_layer = stage.runner.stage.layers.end
        session.link.send(wire.write_hidden_states(header, result), on_sent)
    stage.runner.meter.encoded(time.perf_counter() - begin)
