"""A router that is let in and means no good: over gRPC, against a real shard."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio

from stagecoach import errors
from stagecoach.rpc.shard_rpc import SERVICE_NAME, ShardStub
from stagecoach.v1 import shard_pb2 as pb
from tests.cluster import start_shard
from tests.integration.test_shard_service import (
    TIMEOUT_S,
    loaded,
    micro_batch,
    open_request,
    open_session,
    read_kind,
    refusal,
    running_shard,
)


async def test_what_another_lease_left_in_the_blocks_cannot_be_attended_to(tiny_model: Path) -> None:
    async with running_shard(tiny_model) as (stub, description):
        victim = await open_session(stub, description, num_blocks=description.num_blocks)
        forward = stub.forward()
        await forward.write(micro_batch(list(range(20)), block_table_updates=[(0, 0, [0, 1])]))
        await read_kind(victim, "result")
        victim.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while (await stub.describe(pb.DescribeRequest())).num_free_blocks < description.num_blocks:
                await asyncio.sleep(0)
        thief = await open_session(stub, description, epoch=2, num_blocks=description.num_blocks)
        forward = stub.forward()
        await forward.write(micro_batch([5], start=20, block_table_updates=[(0, 0, [0, 1])], epoch=2))
        error = await refusal(forward)
        assert type(error) is errors.OutOfRange
        assert (error.field, error.limit, error.value) == ("row_starts", "0", "20")
        fault, _ = await read_kind(thief, "fault")
        assert "never written" in fault.status.message


async def test_a_next_hop_that_is_no_address_is_refused(tiny_model: Path) -> None:
    async with running_shard(tiny_model, "0:2") as (stub, description):
        for next_hop in ("unix:/tmp/socket", "127.0.0.1", "http://host:80", "host:0", "a\nb:80"):
            call = stub.session()
            await call.write(open_request(description, next_hop=next_hop))
            error = await refusal(call)
            assert (type(error), error.field) == (errors.InvalidArgument, "next_hop"), next_hop
        assert (await stub.describe(pb.DescribeRequest())).num_free_blocks == description.num_blocks


async def test_a_lease_of_absurd_size_is_refused_and_takes_nothing(tiny_model: Path) -> None:
    async with running_shard(tiny_model) as (stub, description):
        refused: list[dict[str, int]] = [{"num_blocks": number} for number in (0, 2**32 - 1)]
        refused += [{"max_slots": number} for number in (0, 4097, 2**32 - 1)]
        refused += [{"lease_id": 0}]  # whoever has no lease asks under it what is free
        for changes in refused:
            call = stub.session()
            await call.write(open_request(description, **changes))
            error = await refusal(call)
            assert isinstance(error, errors.KVCacheFull) or error.field in ("max_slots", "lease_id"), changes
        assert (await stub.describe(pb.DescribeRequest())).num_free_blocks == description.num_blocks


async def test_a_frame_that_is_nearly_all_header_is_refused_by_its_size(tiny_model: Path) -> None:
    async with running_shard(tiny_model) as (stub, description):
        await open_session(stub, description)
        forward = stub.forward()
        # A field of 9 MiB that no contract knows: it takes neither side long to write or read.
        header = pb.MicroBatchHeader(lease_id=77, epoch=1, step=1).SerializeToString()
        frame = pb.MicroBatch.FromString(b"\x0a" + bytes([len(header)]) + header).SerializeToString()
        await forward.write(frame + b"\x12\x80\x80\xc0\x04" + bytes(9 << 20))
        error = await refusal(forward)
        assert (type(error), error.field, error.limit) == (errors.InvalidArgument, "frame", str(8 << 20))


async def test_what_is_no_request_is_refused_by_name_and_ends_the_session(tiny_model: Path) -> None:
    server = start_shard(tiny_model, "0:4")
    async with grpc.aio.insecure_channel(server.address) as channel:
        description = await loaded(ShardStub(channel))
        of_bytes = channel.stream_stream(f"/{SERVICE_NAME}/Session")
        call = of_bytes()
        await call.write(b"\xff\xff\xff")
        error = await refusal(call)
        assert (type(error), error.field) == (errors.InvalidArgument, "kind")
        call = of_bytes()
        await call.write(open_request(description).SerializeToString())
        await read_kind(call, "opened")
        await call.write(b"\xff\xff\xff")
        fault, _ = await read_kind(call, "fault")
        assert "not a request of a session" in fault.status.message
    await server.close()


async def test_a_lease_with_a_fault_holds_nothing_whether_its_router_hangs_up_or_not(tiny_model: Path) -> None:
    async with running_shard(tiny_model) as (stub, description):
        session = await open_session(stub, description, num_blocks=description.num_blocks)
        await stub.forward().write(micro_batch([5], start=20))
        await read_kind(session, "fault")
        async with asyncio.timeout(TIMEOUT_S):
            while (await stub.describe(pb.DescribeRequest())).num_free_blocks < description.num_blocks:
                await asyncio.sleep(0)
            while await session.read() is not grpc.aio.EOF:
                pass
        assert await session.code() is grpc.StatusCode.OK
