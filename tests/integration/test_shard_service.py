"""One shard, spoken to over gRPC: what it says of itself, whom it lets in, and what it refuses."""

import asyncio
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
import torch

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.errors.status import from_status
from stagecoach.rpc.framing import read_frame, write_frame
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.v1 import model_pb2
from stagecoach.v1 import shard_pb2 as pb
from tests.cluster import start_shard

TIMEOUT_S = 20.0


@asynccontextmanager
async def running_shard(model, layers="0:4", **settings):
    server = start_shard(model, layers, **settings)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = ShardStub(channel)
        yield stub, await loaded(stub)
    await server.close()


async def loaded(stub):
    """The shard's description, once it has loaded."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await stub.describe(pb.DescribeRequest(), wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.01)


def open_request(description, **changes):
    facts = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": description.model.fingerprint,
        "layers": description.layers,
        "dtype": description.dtype,
        "lease_id": 77,
        "epoch": 1,
        "num_blocks": 8,
        "block_size": description.block_size,
        "max_slots": 4,
    }
    return pb.SessionRequest(open=pb.OpenRequest(**(facts | changes)))


async def read_kind(call, kind):
    """The next response of that kind; load reports come at any time."""
    async with asyncio.timeout(TIMEOUT_S):
        while (data := await call.read()) is not grpc.aio.EOF:
            message, payload = read_frame(pb.SessionResponse, data)
            if message.WhichOneof("kind") == kind:
                return getattr(message, kind), payload
    raise AssertionError(f"the session ended without a {kind}: {await call.code()} {await call.details()}")


async def open_session(stub, description, **changes):
    call = stub.session()
    await call.write(open_request(description, **changes))
    await read_kind(call, "opened")
    return call


async def refusal(call):
    """The typed error a call ended with."""
    async with asyncio.timeout(TIMEOUT_S):
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.RpcError as error:
            return errors.from_rpc_error(error, "shard")
        status = await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        return errors.from_rpc_error(grpc.aio.AioRpcError(*status), "shard")


def micro_batch(
    token_ids,
    *,
    step=1,
    start=0,
    block_table_updates=((0, 0, [0, 1]),),
    outputs=None,
    payload=None,
    timings=(),
    **changes,
):
    header = pb.MicroBatchHeader(
        lease_id=77,
        epoch=1,
        step=step,
        row_slots=[0],
        row_starts=[start],
        row_num_tokens=[len(token_ids)],
        dtype=model_pb2.DTYPE_INT32,
        timings=timings,
    )
    for slot, first, block_ids in block_table_updates:
        header.block_table_updates.add(slot=slot, first=first, block_ids=block_ids)
    header.outputs.append(outputs or pb.OutputGroup(token_indices=[len(token_ids) - 1], num_candidates=1))
    for name, value in changes.items():
        setattr(header, name, value)
    data = torch.tensor(token_ids, dtype=torch.int32).numpy().tobytes() if payload is None else payload
    return write_frame(pb.MicroBatch(header=header), [data])


async def test_a_shard_says_what_it_is(tiny_model):
    async with running_shard(tiny_model, "1:3") as (_, description):
        assert description.protocol_version == PROTOCOL_VERSION
        assert (description.layers.start, description.layers.end) == (1, 3)
        assert (description.model.family, description.model.num_layers, description.model.vocab_size) == (
            "llama",
            4,
            260,
        )
        assert len(description.model.fingerprint) == 64
        assert description.num_free_blocks == description.num_blocks > 0
        assert description.weights_bytes > 0


async def test_a_shard_takes_no_more_tokens_than_its_messages_carry_and_says_so(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr("stagecoach_shard.server.max_tokens_per_message", lambda hidden_size, dtype: 100)
    async with running_shard(tiny_model, "0:2", max_batch_tokens=16384) as (_, description):
        assert description.max_batch_tokens == 100
    assert "max-batch-tokens: 16384; 100 are taken at most" in caplog.text


async def test_a_shard_hands_out_the_tokenizer_and_no_weights(tiny_model):
    async with running_shard(tiny_model, "0:2") as (stub, _):
        files = {}
        async for chunk in stub.fetch_files(pb.FetchFilesRequest()):
            files[chunk.name] = files.get(chunk.name, b"") + chunk.data
    assert files["tokenizer.json"] == (tiny_model / "tokenizer.json").read_bytes()
    assert "config.json" in files
    assert not any(name.endswith(".safetensors") for name in files)


async def test_a_whole_model_on_one_shard_computes_what_transformers_computes(tiny_model, reference):
    token_ids = [5, 200, 31, 77, 4, 9]
    expected = reference(torch.tensor([token_ids])).logits[0, -1]
    async with running_shard(tiny_model) as (stub, description):
        session = await open_session(stub, description)
        forward = stub.forward()
        whole = pb.OutputGroup(token_indices=[5], num_candidates=0)
        await forward.write(micro_batch(token_ids, outputs=whole))
        result, payload = await read_kind(session, "result")
        logits = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        assert (result.step, result.outputs[0].num_rows, result.outputs[0].num_columns) == (1, 1, 260)
        torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=0)
        load, _ = await read_kind(session, "load")
        while load.num_steps < 1:
            load, _ = await read_kind(session, "load")
        assert load.num_fast_frames == load.num_frames == 1


async def test_a_load_report_that_is_asked_for_comes_at_once_and_is_of_now(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        session = await open_session(stub, description)
        forward = stub.forward()
        for step, number in ((1, 7), (2, 9)):
            await forward.write(micro_batch([1, 2], step=step))
            await read_kind(session, "result")
            await session.write(pb.SessionRequest(report_load=pb.ReportLoad(number=number)))
            load, _ = await read_kind(session, "load")
            while load.number == 0:  # those that come by themselves
                load, _ = await read_kind(session, "load")
            assert (load.number, load.num_steps, load.num_tokens) == (number, step, 2 * step)
            assert min(load.compute_s, load.wait_s, load.queue_s, load.decode_s, load.encode_s) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol_version": 99},
        {"model_fingerprint": "0" * 64},
        {"layers": model_pb2.LayerRange(start=0, end=3)},
        {"dtype": model_pb2.DTYPE_BFLOAT16},
        {"block_size": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_a_router_that_expects_something_else_is_told_both_values(tiny_model, changes):
    async with running_shard(tiny_model) as (stub, description):
        call = stub.session()
        await call.write(open_request(description, **changes))
        error = await refusal(call)
        assert type(error) is errors.ModelMismatch
        assert error.field == next(iter(changes))
        assert error.limit
        assert error.value


async def test_a_lease_is_freed_when_its_session_ends(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        session = await open_session(stub, description, num_blocks=description.num_blocks)
        refused = stub.session()
        await refused.write(open_request(description, lease_id=78, num_blocks=1))
        assert type(await refusal(refused)) is errors.KVCacheFull
        session.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while (await stub.describe(pb.DescribeRequest())).num_free_blocks < description.num_blocks:
                await asyncio.sleep(0)


async def test_a_newer_epoch_takes_the_lease_over_and_an_older_one_is_refused(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        old = await open_session(stub, description, num_blocks=description.num_blocks)
        new = await open_session(stub, description, epoch=2, num_blocks=description.num_blocks)
        async with asyncio.timeout(TIMEOUT_S):
            while await old.read() is not grpc.aio.EOF:
                pass
        stale = stub.session()
        await stale.write(open_request(description, epoch=1))
        assert type(await refusal(stale)) is errors.StaleEpoch
        forward = stub.forward()
        await forward.write(micro_batch([1, 2], epoch=2))
        result, _ = await read_kind(new, "result")
        assert result.epoch == 2


BAD_MICRO_BATCHES = {
    "unknown lease": (micro_batch([1, 2], lease_id=5), errors.StaleEpoch),
    "stale epoch": (micro_batch([1, 2], epoch=0), errors.StaleEpoch),
    "gap in the steps": (micro_batch([1, 2], step=2), errors.StaleEpoch),
    "meant for another stage": (micro_batch([1, 2], first_layer=2), errors.InvalidArgument),
    "payload too short": (micro_batch([1, 2], payload=b"123"), errors.InvalidArgument),
    "payload of another dtype": (micro_batch([1, 2], dtype=model_pb2.DTYPE_FLOAT32), errors.InvalidArgument),
    "token outside the vocabulary": (micro_batch([1, 260]), errors.OutOfRange),
    "negative token": (micro_batch([1, -1]), errors.OutOfRange),
    "another lease's block": (micro_batch([1, 2], block_table_updates=[(0, 0, [8])]), errors.OutOfRange),
    "position past the table": (micro_batch([1, 2], start=31), errors.OutOfRange),
    "output past the tokens": (micro_batch([1, 2], outputs=pb.OutputGroup(token_indices=[2])), errors.OutOfRange),
    "too many candidates": (
        micro_batch([1, 2], outputs=pb.OutputGroup(token_indices=[1], num_candidates=100_000)),
        errors.OutOfRange,
    ),
    "no temperature": (
        micro_batch([1, 2], outputs=pb.OutputGroup(token_indices=[1], log_sum_exp=True)),
        errors.InvalidArgument,
    ),
    "timings of stages before the first": (micro_batch([1, 2], timings=[pb.StageTiming()]), errors.InvalidArgument),
    "no message": (b"\xff\xff\xff", errors.InvalidArgument),
}


@pytest.mark.parametrize(("frame", "kind"), BAD_MICRO_BATCHES.values(), ids=BAD_MICRO_BATCHES.keys())
async def test_a_bad_micro_batch_ends_its_stream_and_no_other_lease(tiny_model, frame, kind):
    async with running_shard(tiny_model) as (stub, description):
        await open_session(stub, description)
        other = await open_session(stub, description, lease_id=88)
        bad = stub.forward()
        await bad.write(frame)
        error = await refusal(bad)
        assert type(error) is kind
        assert error.field
        good = stub.forward()
        await good.write(micro_batch([1, 2], lease_id=88))
        result, _ = await read_kind(other, "result")
        assert result.step == 1


async def test_a_late_micro_batch_of_an_earlier_epoch_does_not_harm_the_present_one(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        await open_session(stub, description)
        late = stub.forward()
        await late.write(micro_batch([1, 2]))
        session = await open_session(stub, description, epoch=2)
        await late.write(micro_batch([1, 2], step=2))
        assert type(await refusal(late)) is errors.StaleEpoch
        present = stub.forward()
        await present.write(micro_batch([1, 2], epoch=2))
        result, _ = await read_kind(session, "result")
        assert (result.epoch, result.step) == (2, 1)


async def test_a_sender_that_ignores_its_credits_is_cut_off(tiny_model):
    async with running_shard(tiny_model, max_queued_steps=2) as (stub, description):
        session = await open_session(stub, description)
        forward = stub.forward()
        frames = [micro_batch([token % 250], step=step, start=0) for step, token in enumerate(range(200), start=1)]

        async def send():
            for frame in frames:
                await forward.write(frame)

        sending = asyncio.create_task(send())
        fault, _ = await read_kind(session, "fault")
        assert from_status(fault.status).field == "credits"
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_a_fault_reaches_the_router_on_its_session(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        session = await open_session(stub, description)
        forward = stub.forward()
        await forward.write(micro_batch([1, 999]))
        fault, _ = await read_kind(session, "fault")
        assert type(from_status(fault.status)) is errors.OutOfRange


async def test_the_last_stage_takes_no_next_hop_and_the_others_need_one(tiny_model):
    async with running_shard(tiny_model) as (stub, description):
        call = stub.session()
        await call.write(open_request(description, next_hop="127.0.0.1:1"))
        assert (await refusal(call)).field == "next_hop"
    async with running_shard(tiny_model, "0:2") as (stub, description):
        call = stub.session()
        await call.write(open_request(description, next_hop=""))
        assert (await refusal(call)).field == "next_hop"


async def test_a_next_hop_that_is_not_there_fails_the_open(tiny_model):
    async with running_shard(tiny_model, "0:2") as (stub, description):
        call = stub.session()
        await call.write(open_request(description, next_hop="127.0.0.1:1"))
        assert type(await refusal(call)) is errors.Unavailable
        assert (await stub.describe(pb.DescribeRequest())).num_free_blocks == description.num_blocks


async def test_callers_who_do_not_read_a_file_hold_little_of_it(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    size = 24 << 20
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(size)
    async with running_shard(model, "0:2") as (stub, _):
        before = psutil.Process().memory_info().rss
        calls = [stub.fetch_files(pb.FetchFilesRequest()) for _ in range(20)]
        for call in calls:
            assert (await call.read()).name == "tokenizer.json"
        assert psutil.Process().memory_info().rss - before < 10 * size
        for call in calls:
            call.cancel()
