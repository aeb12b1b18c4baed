"""One open pipeline: a session with every stage, and the stream of micro-batches into the first. Effects only.

What goes in and comes out is decided elsewhere; here it is sent, received, and found broken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.channel import MAX_SHARD_MESSAGE_BYTES, channel_options
from stagecoach.forward_link import ForwardLink
from stagecoach.framing import read_frame
from stagecoach.shard_rpc import ShardStub
from stagecoach.topology import LayerRange, order_stages
from stagecoach.v1 import model_pb2, shard_pb2

logger = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 10.0
OPEN_TIMEOUT_S = 20.0
MAX_FILE_BYTES = 256 << 20

ResultHandler = Callable[[shard_pb2.StepResult, memoryview], None]
LostHandler = Callable[[errors.StagecoachError], None]


@dataclass(slots=True)
class Stage:
    """One shard of the pipeline, what it said of itself, and its latest report."""

    address: str
    description: shard_pb2.DescribeResponse
    load: shard_pb2.LoadReport = field(default_factory=shard_pb2.LoadReport)
    channel: grpc.aio.Channel | None = None

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.description.layers.start, self.description.layers.end)


async def discover(addresses: Sequence[str]) -> list[Stage]:
    """Asks every shard who it is, and puts them into pipeline order.

    Raises Unavailable for a shard that does not answer, TopologyError for a gap or an overlap, ModelMismatch for shards
    of different models, dtypes, block sizes or protocols.
    """
    answers = await asyncio.gather(*(_describe(address) for address in addresses), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    stages = [answer for answer in answers if isinstance(answer, Stage)]
    first = stages[0]
    for stage in stages:
        _check_same("protocol_version", stage, stage.description.protocol_version, PROTOCOL_VERSION, "this router")
        for name in ("fingerprint", "num_layers", "hidden_size", "vocab_size", "context_length"):
            ours, theirs = getattr(first.description.model, name), getattr(stage.description.model, name)
            _check_same(f"model.{name}", stage, theirs, ours, first.address)
        _check_same(
            "dtype",
            stage,
            model_pb2.DType.Name(stage.description.dtype),
            model_pb2.DType.Name(first.description.dtype),
            first.address,
        )
        _check_same("block_size", stage, stage.description.block_size, first.description.block_size, first.address)
    order = order_stages([stage.layers for stage in stages], first.description.model.num_layers)
    return [stages[index] for index in order]


def check_same_pipeline(before: Stage, now: Stage) -> None:
    """Raises ModelMismatch where the shards that came back do not hold what the sequences were computed with."""
    for name in ("fingerprint", "vocab_size", "context_length"):
        ours, theirs = getattr(before.description.model, name), getattr(now.description.model, name)
        _check_same(f"model.{name}", now, theirs, ours, "this pipeline")
    for name in ("dtype", "block_size"):
        ours, theirs = getattr(before.description, name), getattr(now.description, name)
        _check_same(name, now, theirs, ours, "this pipeline")


async def fetch_files(address: str) -> dict[str, bytes]:
    """The tokenizer and configuration files of a shard's checkpoint."""
    files: dict[str, bytearray] = {}
    total = 0
    async with grpc.aio.insecure_channel(address, options=channel_options(MAX_SHARD_MESSAGE_BYTES)) as channel:
        try:
            async for chunk in ShardStub(channel).fetch_files(shard_pb2.FetchFilesRequest(), timeout=OPEN_TIMEOUT_S):
                total += len(chunk.data)
                if total > MAX_FILE_BYTES:
                    raise errors.OutOfRange(
                        f"{address}: files of more than {MAX_FILE_BYTES} bytes", field="files", limit=MAX_FILE_BYTES
                    )
                files.setdefault(chunk.name, bytearray()).extend(chunk.data)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address) from error
    return {name: bytes(data) for name, data in files.items()}


class Pipeline:
    """The stages of one model, opened under one lease and one epoch.

    `on_result` gets the last stage's results in the order of the steps. `on_lost` is called once when any part breaks;
    nothing is delivered after it.
    """

    def __init__(
        self, stages: list[Stage], *, lease_id: int, epoch: int, on_result: ResultHandler, on_lost: LostHandler
    ) -> None:
        self.stages = stages
        self.epoch = epoch
        self.num_blocks = 0
        self.max_batch_tokens = min(stage.description.max_batch_tokens for stage in stages)
        self.lease_id = lease_id
        self.lost: errors.StagecoachError | None = None
        self._on_result = on_result
        self._on_lost = on_lost
        self._link: ForwardLink | None = None
        self._readers: list[asyncio.Task[None]] = []

    async def open(self, *, num_blocks: int, max_slots: int) -> None:
        """Opens a session with every stage, then the stream into the first. Raises the first stage's typed error."""
        self.num_blocks = num_blocks
        try:
            await asyncio.gather(
                *(self._open_session(index, num_blocks, max_slots) for index in range(len(self.stages)))
            )
            self._link = ForwardLink(self.stages[0].address, on_failure=self._lose)
            await self._link.open(OPEN_TIMEOUT_S)
        except BaseException:
            await self.close()
            raise

    def send(self, frame: bytes) -> None:
        """Queues a framed MicroBatch for the first stage."""
        assert self._link is not None, "send before open"
        self._link.send(frame)

    async def close(self) -> None:
        """Ends the lease on every stage."""
        self.lost = self.lost or errors.Unavailable("the pipeline is closed")
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
        await asyncio.gather(*(stage.channel.close() for stage in self.stages if stage.channel is not None))

    async def _open_session(self, index: int, num_blocks: int, max_slots: int) -> None:
        stage = self.stages[index]
        description = stage.description
        stage.channel = grpc.aio.insecure_channel(stage.address, options=channel_options(MAX_SHARD_MESSAGE_BYTES))
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
        )
        try:
            await call.write(shard_pb2.SessionRequest(open=request))
            data = await asyncio.wait_for(call.read(), OPEN_TIMEOUT_S)
        except TimeoutError:
            raise errors.Unavailable(f"{stage.address}: no answer to Open in {OPEN_TIMEOUT_S:g} s") from None
        except asyncio.InvalidStateError:
            data = grpc.aio.EOF
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, stage.address) from error
        if data is grpc.aio.EOF:
            raise await _why_ended(call, stage.address)
        self._readers.append(asyncio.create_task(self._read(stage, call)))

    async def _read(self, stage: Stage, call: grpc.aio.StreamStreamCall[shard_pb2.SessionRequest, bytes]) -> None:
        try:
            while isinstance(data := await call.read(), bytes):
                message, payload = read_frame(shard_pb2.SessionResponse, data)
                kind = message.WhichOneof("kind")
                if kind == "result" and self.lost is None:
                    self._on_result(message.result, payload)
                elif kind == "load":
                    stage.load = message.load
                elif kind == "fault":
                    self._lose(
                        errors.ShardFault(f"stage {stage.layers} at {stage.address}: {message.fault.error.message}")
                    )
            error: errors.StagecoachError = await _why_ended(call, stage.address)
        except grpc.RpcError as rpc_error:
            error = errors.from_rpc_error(rpc_error, stage.address)
        except errors.StagecoachError as typed:
            error = typed
        except Exception as unforeseen:  # a bug, here or there: without this the streams would wait for ever
            logger.exception("reading from %s", stage.address)
            error = errors.ShardFault(f"stage {stage.layers} at {stage.address}: {unforeseen!r}")
        self._lose(error)

    def _lose(self, error: errors.StagecoachError) -> None:
        if self.lost is None:
            self.lost = error
            self._on_lost(error)


async def _describe(address: str) -> Stage:
    async with grpc.aio.insecure_channel(address, options=channel_options(MAX_SHARD_MESSAGE_BYTES)) as channel:
        try:
            description = await ShardStub(channel).describe(shard_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise errors.Unavailable(f"{address}: no answer to Describe in {DESCRIBE_TIMEOUT_S:g} s") from error
            raise errors.from_rpc_error(error, address) from error
    return Stage(address, description)


async def _why_ended(
    call: grpc.aio.StreamStreamCall[shard_pb2.SessionRequest, bytes], address: str
) -> errors.StagecoachError:
    """The error behind a session that the shard has ended."""
    code = await call.code()
    for key, value in await call.trailing_metadata() or ():
        if key == errors.DETAIL_METADATA_KEY and isinstance(value, bytes):
            return errors.from_detail(model_pb2.ErrorDetail.FromString(value))
    return errors.Unavailable(f"{address}: the session ended ({code.name}: {await call.details()})")


def _check_same(field_name: str, stage: Stage, theirs: object, ours: object, who: str) -> None:
    if theirs != ours:
        raise errors.ModelMismatch(
            f"{field_name}: {stage.address} has {theirs}, {who} has {ours}", field=field_name, limit=ours, value=theirs
        )
