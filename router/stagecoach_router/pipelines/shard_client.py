"""What a router asks of a shard before it is in a pipeline: who it is, its files, and to load other layers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
import grpc.aio

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.pipelines.shard_description import check_description

DESCRIBE_TIMEOUT_S = 10.0
# Reading some dozen GB from a slow disk.
LOAD_TIMEOUT_S = 1800.0
FETCH_TIMEOUT_S = 20.0
MAX_FILE_BYTES = 256 << 20


@dataclass(slots=True)
class Stage:
    """One shard, what it said of itself, and the session with it."""

    address: str
    description: shard_pb2.DescribeResponse
    queue_depth: int = 0
    channel: grpc.aio.Channel | None = None
    report_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    # Load reports that somebody waits for, by number.
    reports: dict[int, asyncio.Future[None]] = field(default_factory=dict)

    @property
    def layers(self) -> LayerRange:
        """Of one that has some."""
        return LayerRange(self.description.layers.start, self.description.layers.end)


async def describe(
    address: str, dial: Dial = dial_plainly, *, lease_id: int = 0, timeout_s: float = DESCRIBE_TIMEOUT_S
) -> Stage:
    """Asks a shard who it is. What the lease `lease_id` still holds there counts as free, as it can be opened anew.

    Raises Unavailable for one that does not answer, ModelMismatch for one of another protocol or with absurd figures.
    """
    async with dial(address) as channel:
        try:
            request = shard_pb2.DescribeRequest(lease_id=lease_id)
            description = await ShardStub(channel).describe(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                text = f"{address}: no answer to Describe in {timeout_s:g} s"
                raise errors.Unavailable(text, addresses=[address]) from error
            raise errors.from_rpc_error(error, address) from error
    _check_same("protocol_version", address, description.protocol_version, PROTOCOL_VERSION, "this router")
    check_description(address, description)
    return Stage(address, description)


async def assign(address: str, layers: LayerRange, dial: Dial = dial_plainly, *, fingerprint: str) -> None:
    """Has a shard load `layers`; returns when it has. Raises what it refuses that with, ShardFault where it lies."""
    request = shard_pb2.AssignRequest(
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=fingerprint,
        layers=model_pb2.LayerRange(start=layers.start, end=layers.end),
    )
    async with dial(address) as channel:
        try:
            answer = await ShardStub(channel).assign(request, timeout=LOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address) from error
    loaded = answer.description.layers
    if (loaded.start, loaded.end) != (layers.start, layers.end):
        raise errors.ShardFault(
            f"{address} was told to load layers {layers} and has {loaded.start}:{loaded.end}",
            field="layers",
            limit=layers,
            value=f"{loaded.start}:{loaded.end}",
            addresses=[address],
        )


def check_same_model(stage: Stage, reference: Stage) -> None:
    """Raises ModelMismatch where two shards cannot be in pipelines of one model, or one cannot replace the other."""
    theirs, ours = stage.description, reference.description
    for name in ("fingerprint", "num_layers", "hidden_size", "vocab_size", "context_length"):
        field_name = f"model.{name}"
        _check_same(
            field_name, stage.address, getattr(theirs.model, name), getattr(ours.model, name), reference.address
        )
    dtypes = model_pb2.DType.Name(theirs.dtype), model_pb2.DType.Name(ours.dtype)
    _check_same("dtype", stage.address, *dtypes, reference.address)
    _check_same("block_size", stage.address, theirs.block_size, ours.block_size, reference.address)


def is_same_shard(one: Stage, other: Stage) -> bool:
    """Whether two addresses lead to one process, with the layers that it has now."""
    return bool(one.description.shard_id) and one.description.shard_id == other.description.shard_id


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
                        f"{address}: files of more than {MAX_FILE_BYTES} bytes",
                        field="files",
                        limit=MAX_FILE_BYTES,
                        addresses=[address],
                    )
                files.setdefault(chunk.name, bytearray()).extend(chunk.data)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address) from error
    return {name: bytes(data) for name, data in files.items()}


def _check_same(field_name: str, address: str, theirs: object, ours: object, who: str) -> None:
    if theirs != ours:
        raise errors.ModelMismatch(
            f"{field_name}: {address} has {theirs}, {who} has {ours}",
            field=field_name,
            limit=ours,
            value=theirs,
            addresses=[address],
        )
