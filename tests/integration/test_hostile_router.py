"""A router that is let in and means no good: over gRPC, against a real shard."""

from __future__ import annotations

import asyncio
from pathlib import Path

from stagecoach import errors
from stagecoach.v1 import shard_pb2 as pb
from tests.integration.test_shard_service import (
    TIMEOUT_S,
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
        for changes in refused:
            call = stub.session()
            await call.write(open_request(description, **changes))
            error = await refusal(call)
            assert isinstance(error, errors.KVCacheFull) or error.field == "max_slots", changes
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
