"""One end of a hop on our own path: all that a stage does with a micro-batch but the computing.

A frame arrives on a Forward stream, is read into a tensor that looks into its bytes, goes to a compute thread and comes
back to the event loop, is written as a frame again and leaves on the link to the other end. Framing, link, stub and
tensors are those of the shard server; the thread and the credits are used as it uses them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from torch import Tensor

from stagecoach import errors
from stagecoach.rpc.credits import CreditWindow
from stagecoach.rpc.forward_link import ForwardLink
from stagecoach.rpc.framing import FrameCounter, read_frame
from stagecoach.rpc.shard_rpc import shard_handlers
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_shard.leases import wire
from stagecoach_shard.settings import ShardSettings

HIDDEN_SIZE = 4096
BYTES_PER_TOKEN = 2 * HIDDEN_SIZE  # bfloat16
MAX_QUEUED_STEPS = int(ShardSettings.model_fields["max_queued_steps"].default)

# header.lease_id: what the other end does with a frame; with INLINE neither end uses its compute thread.
ECHO, SINK, INLINE = 1, 2, 4

Context = grpc.aio.ServicerContext[Any, Any]


def micro_batch_header(num_tokens: int, *, lease_id: int, step: int, num_steps: int = 0) -> shard_pb2.MicroBatchHeader:
    """A header such as a step has: decodes of one token each, or, from more than 32 tokens, four chunks of prefill."""
    num_rows = num_tokens if num_tokens <= 32 else 4
    return shard_pb2.MicroBatchHeader(
        lease_id=lease_id,
        epoch=num_steps,
        step=step,
        row_slots=range(num_rows),
        row_starts=[512] * num_rows,
        row_num_tokens=[num_tokens // num_rows] * num_rows,
        block_table_updates=[shard_pb2.BlockTableUpdate(slot=0, first=32, block_ids=[700])],
        outputs=[shard_pb2.OutputGroup(token_indices=range(num_rows), num_candidates=1)],
        dtype=model_pb2.DTYPE_BFLOAT16,
        first_layer=16,
    )


@dataclass(slots=True)
class Endpoint:
    """`on_computed(header, hidden_states, give_credit_back)` is called on the event loop, frame after frame."""

    on_computed: Callable[[shard_pb2.MicroBatchHeader, Tensor, Callable[[], None]], None]
    frames: FrameCounter = field(default_factory=FrameCounter)
    _queue: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)

    def start(self, server: grpc.aio.Server) -> None:
        """Adds the Shard service to `server`, and starts the compute thread."""
        handlers = shard_handlers(
            describe=_refuse, assign=_refuse, fetch_files=_refuse, session=_refuse_stream, forward=self._forward
        )
        server.add_generic_rpc_handlers((handlers,))
        threading.Thread(target=self._compute, name="compute", daemon=True).start()

    def _compute(self) -> None:
        while True:
            self._queue.get()()

    async def _forward(self, _: object, context: Context) -> None:
        outbox: asyncio.Queue[int | None] = asyncio.Queue()
        outbox.put_nowait(MAX_QUEUED_STEPS)
        window = CreditWindow(MAX_QUEUED_STEPS)
        reader = asyncio.create_task(self._read_micro_batches(context, outbox))
        try:
            while (credits := await outbox.get()) is not None:
                if due := window.give_back(credits):
                    await context.write(shard_pb2.ForwardResponse(credits=due))
        finally:
            reader.cancel()

    async def _read_micro_batches(self, context: Context, outbox: asyncio.Queue[int | None]) -> None:
        loop = asyncio.get_running_loop()

        def give_credit_back() -> None:
            outbox.put_nowait(1)

        while isinstance(data := await context.read(), bytes):
            message, payload = read_frame(shard_pb2.MicroBatch, data, self.frames)
            header = message.header
            tensor, copied = wire.read_inputs(
                payload,
                header.dtype,
                num_tokens=sum(header.row_num_tokens),
                hidden_size=HIDDEN_SIZE,
                dtype=_MODEL_DTYPE,
                vocab_size=0,
            )
            if copied:
                self.frames.payload_was_copied()
            if header.lease_id & INLINE:
                self.on_computed(header, tensor, give_credit_back)
                continue

            def computed(header: shard_pb2.MicroBatchHeader = header, tensor: Tensor = tensor) -> None:
                loop.call_soon_threadsafe(self.on_computed, header, tensor, give_credit_back)

            self._queue.put(computed)
        outbox.put_nowait(None)


class Answerer:
    """What the other process does with frames: sends each back, or counts them and answers the last one."""

    def __init__(self) -> None:
        self.link: ForwardLink | None = None
        self.endpoint = Endpoint(self._on_computed)

    async def connect(self, address: str, timeout_s: float) -> None:
        self.link = ForwardLink(address, on_failure=_ignore)
        await self.link.open(timeout_s)

    async def close(self) -> None:
        if self.link is not None:
            await self.link.close()

    def _on_computed(
        self, header: shard_pb2.MicroBatchHeader, tensor: Tensor, give_credit_back: Callable[[], None]
    ) -> None:
        assert self.link is not None, "frames come only from who is connected"
        if header.lease_id & ECHO:
            self.link.send(wire.write_hidden_states(header, tensor), give_credit_back)
            return
        give_credit_back()
        if header.step == header.epoch:
            answer = micro_batch_header(1, lease_id=header.lease_id, step=header.step)
            self.link.send(wire.write_hidden_states(answer, tensor[:1]))


_MODEL_DTYPE = next(dtype for dtype, number in wire.DTYPES.items() if number == model_pb2.DTYPE_BFLOAT16)


def _ignore(error: errors.StagecoachError) -> None:
    """The other end has gone, which is how a run ends."""


async def _refuse(_: object, context: Context) -> Any:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a hop has no such call")


async def _refuse_stream(_: object, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a hop has no such call")
