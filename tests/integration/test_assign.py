"""A shard without layers of its own, over gRPC: it loads what it is told, and holds nothing of what it had before."""

import asyncio
import gc
import threading
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.rpc.channel import dial_plainly
from stagecoach.rpc.shard_rpc import ShardStub
from stagecoach.security.tls import ROUTER_NAME, SHARD_NAME, Identity, shard_dial
from stagecoach.v1 import model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_local.certificates import ThrowawayCA
from stagecoach_router.pipelines.shard_description import check_description
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.runtime.stage import Stage
from stagecoach_shard.runtime.stage_runner import StageRunner
from tests.cluster import free_port, start_shard
from tests.held_stage import held_stages
from tests.integration.test_shard_service import (
    loaded,
    micro_batch,
    open_request,
    open_session,
    read_kind,
    refusal,
    running_shard,
)

TIMEOUT_S = 30.0


@asynccontextmanager
async def unassigned(model, dial=dial_plainly, **settings):
    """A shard without layers: its stub, its description, and its health."""
    server = start_shard(model, "auto", **settings)
    try:
        async with asyncio.timeout(TIMEOUT_S), dial(server.address) as channel:
            stub = ShardStub(channel)
            yield stub, await loaded(stub), HealthStub(channel)
    finally:
        await server.close()


def request(description, start, end, **changes):
    facts = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": description.model.fingerprint,
        "layers": model_pb2.LayerRange(start=start, end=end),
    }
    return pb.AssignRequest(**(facts | changes))


async def assign(stub, description, start, end, **changes):
    """The new description."""
    return (await stub.assign(request(description, start, end, **changes))).description


async def refused(call):
    """The typed error of a call that gets no answer."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return errors.from_rpc_error(caught.value, "shard")


async def is_ready(health):
    answer = await health.Check(HealthCheckRequest(service="stagecoach.v1.Shard"))
    return answer.status == HealthCheckResponse.SERVING


@asynccontextmanager
async def held_loading(monkeypatch):
    """Loads begin, which the event says, and end when `goes_on` is set, or when they are abandoned."""
    begun, goes_on = threading.Event(), threading.Event()
    load = Stage.load

    def hold(*arguments, progress, **facts):
        begun.set()
        while not goes_on.wait(0.01):
            progress(0, 1)
        return load(*arguments, progress=progress, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "load", hold)
        try:
            yield begun, goes_on
        finally:
            goes_on.set()


async def begins(begun):
    assert await asyncio.to_thread(begun.wait, TIMEOUT_S)


async def test_a_shard_without_layers_says_so_and_hands_out_files(tiny_model):
    async with unassigned(tiny_model) as (stub, description, health):
        check_description("shard", description)
        assert description.assignable
        assert description.protocol_version == PROTOCOL_VERSION
        assert (description.layers.start, description.layers.end) == (0, 0)
        assert description.num_blocks == description.num_free_blocks == description.weights_bytes == 0
        assert description.model.num_layers == 4
        assert description.dtype == model_pb2.DTYPE_FLOAT32
        assert min(description.block_size, description.max_batch_tokens, description.max_queued_steps) > 0
        assert description.device == "cpu"
        assert await is_ready(health)
        names = {chunk.name async for chunk in stub.fetch_files(pb.FetchFilesRequest())}
        assert {"tokenizer.json", "config.json"} <= names


async def test_a_shard_without_layers_takes_no_lease_and_no_micro_batch(tiny_model):
    async with unassigned(tiny_model) as (stub, description, _):
        session, forward = stub.session(), stub.forward()
        await session.write(open_request(description))
        for error in (await refusal(session), await refusal(forward)):
            assert type(error) is errors.FailedPrecondition
            assert "no layers yet" in error.message


async def test_it_computes_the_layers_it_was_told_to(tiny_model, reference):
    token_ids = [5, 200, 31, 77, 4, 9]
    expected = reference(torch.tensor([token_ids])).logits[0, -1]
    async with unassigned(tiny_model) as (stub, description, health):
        answer = await assign(stub, description, 0, 4)
        check_description("shard", answer)
        assert (answer.layers.start, answer.layers.end) == (0, 4)
        assert answer.num_blocks == answer.num_free_blocks > 0
        assert answer.assignable
        assert answer == await stub.describe(pb.DescribeRequest())
        assert await is_ready(health)
        session, forward = await open_session(stub, answer), stub.forward()
        await forward.write(micro_batch(token_ids, outputs=pb.OutputGroup(token_indices=[5])))
        _, payload = await read_kind(session, "result")
        logits = torch.frombuffer(bytearray(payload), dtype=torch.float32)
        torch.testing.assert_close(logits, expected.detach(), atol=1e-4, rtol=0)


async def test_told_the_range_that_it_has_it_answers_at_once_also_under_a_lease(tiny_model):
    async with unassigned(tiny_model) as (stub, description, _):
        first = await assign(stub, description, 1, 3)
        session = await open_session(stub, await assign(stub, description, 0, 4))
        again = await assign(stub, description, 0, 4)
        assert again.shard_id == (await stub.describe(pb.DescribeRequest())).shard_id
        assert len({description.shard_id, first.shard_id, again.shard_id}) == 3, "counters that begin anew need a name"
        session.cancel()


async def test_a_lease_keeps_its_layers_until_it_ends(tiny_model):
    async with unassigned(tiny_model) as (stub, description, _):
        session = await open_session(stub, await assign(stub, description, 0, 4))
        error = await refused(stub.assign(request(description, 0, 2)))
        assert type(error) is errors.FailedPrecondition
        assert (error.field, error.limit, error.value) == ("layers", "0:4", "0:2")
        forward = stub.forward()
        await forward.write(micro_batch([1, 2, 3]))
        await read_kind(session, "result")
        session.cancel()
        while (now := await stub.describe(pb.DescribeRequest())).num_free_blocks < now.num_blocks:
            await asyncio.sleep(0)
        assert (await assign(stub, description, 0, 2)).layers.end == 2
        # The stream of the former lease is still there, and has no way to the new layers.
        await forward.write(micro_batch([4], step=2, start=3, block_table_updates=()))
        assert type(await refusal(forward)) is errors.StaleEpoch


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"protocol_version": PROTOCOL_VERSION - 1}, errors.ModelMismatch, "protocol_version"),
        ({"model_fingerprint": "0" * 64}, errors.ModelMismatch, "model_fingerprint"),
        ({"layers": model_pb2.LayerRange()}, errors.InvalidArgument, "layers"),
        ({"layers": model_pb2.LayerRange(start=3, end=3)}, errors.InvalidArgument, "layers"),
        ({"layers": model_pb2.LayerRange(start=3, end=1)}, errors.InvalidArgument, "layers"),
        ({"layers": model_pb2.LayerRange(start=3, end=5)}, errors.OutOfRange, "layers"),
        ({"layers": model_pb2.LayerRange(start=2**32 - 2, end=2**32 - 1)}, errors.OutOfRange, "layers"),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(tiny_model, changes, kind, field):
    async with unassigned(tiny_model) as (stub, description, _):
        before = await assign(stub, description, 1, 3)
        error = await refused(stub.assign(request(description, 0, 2, **changes)))
        assert (type(error), error.field) == (kind, field)
        assert await stub.describe(pb.DescribeRequest()) == before


async def test_a_shard_with_a_range_of_its_own_takes_no_other(tiny_model):
    async with running_shard(tiny_model, "0:2") as (stub, description):
        assert not description.assignable
        error = await refused(stub.assign(request(description, 2, 4)))
        assert type(error) is errors.FailedPrecondition
        assert await stub.describe(pb.DescribeRequest()) == description


async def test_while_it_loads_it_says_what_and_nobody_elses_load_is_begun(tiny_model, monkeypatch):
    async with unassigned(tiny_model) as (stub, description, health), held_loading(monkeypatch) as (begun, goes_on):
        leaves, stays = (asyncio.ensure_future(assign(stub, description, 0, 4)) for _ in range(2))
        await begins(begun)
        leaves.cancel()
        session = stub.session()
        await session.write(open_request(description))
        refusals = [
            await refused(stub.describe(pb.DescribeRequest())),
            await refused(stub.assign(request(description, 0, 2))),
            await refusal(session),
            await refusal(stub.forward()),
        ]
        for error in refusals:
            assert type(error) is errors.Unavailable
            assert "loading layers 0:4" in error.message
        assert not await is_ready(health)
        assert (await health.Check(HealthCheckRequest(service="liveness"))).status == HealthCheckResponse.SERVING
        goes_on.set()
        assert (await stays).layers.end == 4
        assert await is_ready(health)


async def test_a_shard_that_is_told_to_stop_while_it_loads_stops(tiny_model, monkeypatch):
    shard = start_shard(tiny_model, "auto")
    async with (
        asyncio.timeout(TIMEOUT_S),
        held_loading(monkeypatch) as (begun, _),
        grpc.aio.insecure_channel(shard.address) as channel,
    ):
        stub = ShardStub(channel)
        description = await loaded(stub)
        waiting = asyncio.ensure_future(refused(stub.assign(request(description, 0, 4))))
        await begins(begun)
        await shard.close()
        assert type(await waiting) is errors.Unavailable


class Exited(Exception):
    """Instead of the end of the process."""


async def test_a_step_that_does_not_end_when_its_layers_are_let_go_ends_the_process(tiny_model, monkeypatch):
    def exit_at_once(status):
        raise Exited(status)

    monkeypatch.setattr("stagecoach_shard.leases.assignment.STOP_COMPUTING_TIMEOUT_S", 0.2)
    monkeypatch.setattr("stagecoach_shard.server._exit_at_once", exit_at_once)
    shard = start_shard(tiny_model, "auto")
    async with asyncio.timeout(TIMEOUT_S), grpc.aio.insecure_channel(shard.address) as channel:
        stub = ShardStub(channel)
        description = await loaded(stub)
        session, forward = await open_session(stub, await assign(stub, description, 0, 4)), stub.forward()
        with held_stages(monkeypatch) as goes_on:
            goes_on.clear()
            await forward.write(micro_batch([1, 2, 3]))
            while not (await read_kind(session, "load"))[0].lease_compute_s:
                pass
            session.cancel()
            while (now := await stub.describe(pb.DescribeRequest())).num_free_blocks < now.num_blocks:
                await asyncio.sleep(0)
            error = await refused(stub.assign(request(description, 0, 2)))
            assert "a step of other layers has not ended" in error.message
            with pytest.raises(Exited, match="1"):
                await shard.task


@pytest.mark.parametrize("settings", [{"kv_cache_memory": "900T"}, {"kv_cache_memory": "1K"}])
async def test_layers_that_do_not_fit_leave_it_without_any_and_say_why(tiny_model, settings):
    async with unassigned(tiny_model, **settings) as (stub, description, health):
        error = await refused(stub.assign(request(description, 0, 4)))
        assert (type(error), error.field) == (errors.FailedPrecondition, "kv-cache-memory")
        assert await stub.describe(pb.DescribeRequest()) == description
        assert await is_ready(health)


async def test_weights_larger_than_the_memory_are_not_even_begun(tiny_model, monkeypatch):
    async with unassigned(tiny_model) as (stub, description, _):
        monkeypatch.setattr("stagecoach_shard.runtime.stage_loader.free_bytes", lambda device: 1000)
        error = await refused(stub.assign(request(description, 0, 4)))
        assert (type(error), error.field, error.limit) == (errors.FailedPrecondition, "layers", "1000")


def in_memory():
    """What there is of stages and their like in this process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (Stage, KVCache, StageRunner)]


def compute_threads():
    return {thread for thread in threading.enumerate() if thread.name == "compute"}


async def test_nothing_of_former_layers_stays_in_memory(tiny_model, monkeypatch):
    load = StageRunner.start
    before, threads_before = len(in_memory()), compute_threads()  # another test's may not have ended yet
    async with unassigned(tiny_model) as (stub, description, _):
        for layers in ((0, 4), (0, 2), (2, 4), (0, 4)):
            answer = await assign(stub, description, *layers)
            if layers == (0, 4):  # used, and its Forward stream left open
                session, forward = await open_session(stub, answer), stub.forward()
                await forward.write(micro_batch([1, 2, 3]))
                await read_kind(session, "result")
                session.cancel()
                while (now := await stub.describe(pb.DescribeRequest())).num_free_blocks < now.num_blocks:
                    await asyncio.sleep(0)
            assert len(in_memory()) == before + 3
            assert len(compute_threads() - threads_before) == 1

        def fail(self):
            raise MemoryError("when nearly all was there")

        monkeypatch.setattr(StageRunner, "start", fail)
        error = await refused(stub.assign(request(description, 0, 2)))
        assert "when nearly all was there" in error.message
        assert len(in_memory()) == before
        monkeypatch.setattr(StageRunner, "start", load)
        assert (await assign(stub, description, 0, 2)).layers.end == 2


async def test_only_the_router_assigns(tiny_model, tmp_path):
    authority = ThrowawayCA(tmp_path)
    own, router = authority.issue(SHARD_NAME), authority.issue(ROUTER_NAME)
    settings = {"tls_cert": own.cert, "tls_key": own.key, "tls_ca": authority.ca}
    as_router = shard_dial(Identity(*router, authority.ca), SHARD_NAME)
    address = f"127.0.0.1:{free_port()}"
    async with unassigned(tiny_model, as_router, listen=address, **settings) as (stub, description, _):
        as_shard = shard_dial(Identity(*own, authority.ca), SHARD_NAME)
        async with as_shard(address) as channel:
            error = await refused(ShardStub(channel).assign(request(description, 0, 4)))
            assert (type(error), error.field) == (errors.PermissionDenied, "allow_assign")
            assert (await ShardStub(channel).describe(pb.DescribeRequest())) == description
        assert (await assign(stub, description, 0, 4)).layers.end == 4
