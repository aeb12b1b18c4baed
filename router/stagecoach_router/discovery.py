"""Who the shards are: asked before a pipeline is opened over them, and put into its order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.channel import Dial, dial_plainly
from stagecoach.shard_rpc import ShardStub
from stagecoach.topology import LayerRange, order_stages
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.description import check_description

DESCRIBE_TIMEOUT_S = 10.0
FETCH_TIMEOUT_S = 20.0
MAX_FILE_BYTES = 256 << 20


@dataclass(slots=True)
class Stage:
    """One shard of the pipeline, what it said of itself, and the session with it."""

    address: str
    description: shard_pb2.DescribeResponse
    queue_depth: int = 0
    channel: grpc.aio.Channel | None = None
    report_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    # Load reports that somebody waits for, by number.
    reports: dict[int, asyncio.Future[None]] = field(default_factory=dict)

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.description.layers.start, self.description.layers.end)


async def discover(addresses: Sequence[str], dial: Dial = dial_plainly, *, lease_id: int = 0) -> list[Stage]:
    """Asks every shard who it is, and puts them into pipeline order.

    What the lease `lease_id` still holds somewhere counts as free, as it can be opened anew.

    Raises Unavailable for a shard that does not answer, TopologyError for a gap or an overlap, ModelMismatch for shards
    of different models, dtypes, block sizes or protocols.
    """
    answers = await asyncio.gather(
        *(_describe(address, dial, lease_id) for address in addresses), return_exceptions=True
    )
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


async def fetch_files(address: str, dial: Dial = dial_plainly) -> dict[str, bytes]:
    """The tokenizer and configuration files of a shard's checkpoint."""
    files: dict[str, bytearray] = {}
    total = 0
    async with dial(address) as channel:
        try:
            async for chunk in ShardStub(channel).fetch_files(shard_pb2.FetchFilesRequest(), timeout=FETCH_TIMEOUT_S):
                total += len(chunk.data) + len(chunk.name)
                if total > MAX_FILE_BYTES:
                    raise errors.OutOfRange(
                        f"{address}: files of more than {MAX_FILE_BYTES} bytes", field="files", limit=MAX_FILE_BYTES
                    )
                files.setdefault(chunk.name, bytearray()).extend(chunk.data)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address) from error
    return {name: bytes(data) for name, data in files.items()}


async def _describe(address: str, dial: Dial, lease_id: int) -> Stage:
    async with dial(address) as channel:
        try:
            request = shard_pb2.DescribeRequest(lease_id=lease_id)
            description = await ShardStub(channel).describe(request, timeout=DESCRIBE_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise errors.Unavailable(f"{address}: no answer to Describe in {DESCRIBE_TIMEOUT_S:g} s") from error
            raise errors.from_rpc_error(error, address) from error
    if description.protocol_version == PROTOCOL_VERSION:  # of another one nothing else can be told
        check_description(address, description)
    return Stage(address, description)


def _check_same(field_name: str, stage: Stage, theirs: object, ours: object, who: str) -> None:
    if theirs != ours:
        raise errors.ModelMismatch(
            f"{field_name}: {stage.address} has {theirs}, {who} has {ours}", field=field_name, limit=ours, value=theirs
        )
