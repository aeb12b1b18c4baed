"""What a router asks of a shard outside of any pipeline: who it is, and to load other layers."""

from __future__ import annotations

import grpc
import grpc.aio

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.pipelines.shard_description import ShardDescription, check_description, check_same

DESCRIBE_TIMEOUT_S = 10.0
# Reading some dozen GB from a slow disk.
LOAD_TIMEOUT_S = 1800.0


async def describe(
    address: str, dial: Dial = dial_plainly, *, lease_id: int = 0, timeout_s: float = DESCRIBE_TIMEOUT_S
) -> ShardDescription:
    """Asks a shard who it is. What the lease `lease_id` still holds there counts as free, as it can be opened anew.

    Raises Unavailable for one that does not answer, ModelMismatch for one of another protocol or with absurd figures.
    """
    async with dial(address) as channel:
        try:
            request = shard_pb2.DescribeRequest(lease_id=lease_id)
            facts = await ShardStub(channel).describe(request, timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                text = f"{address}: no answer to Describe in {timeout_s:g} s"
                raise errors.Unavailable(text, addresses=[address]) from error
            raise errors.from_rpc_error(error, address, names_peer=True) from error
    check_same("protocol_version", address, facts.protocol_version, "this router", PROTOCOL_VERSION)
    check_description(address, facts)
    return ShardDescription(address, facts)


async def assign(address: str, layers: LayerRange, dial: Dial = dial_plainly, *, fingerprint: str) -> None:
    """Has a shard load `layers`; returns when it has.

    Raises what it refuses that with, ShardFault where it has loaded something else.
    """
    request = shard_pb2.AssignRequest(
        protocol_version=PROTOCOL_VERSION,
        model_fingerprint=fingerprint,
        layers=model_pb2.LayerRange(start=layers.start, end=layers.end),
    )
    async with dial(address) as channel:
        try:
            answer = await ShardStub(channel).assign(request, timeout=LOAD_TIMEOUT_S)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error, address, names_peer=True) from error
    loaded = answer.description.layers
    if (loaded.start, loaded.end) != (layers.start, layers.end):
        has = f"{loaded.start}:{loaded.end}"
        text = f"{address} was told to load layers {layers} and has {has}"
        raise errors.ShardFault(text, field="layers", limit=layers, value=has, addresses=[address])
