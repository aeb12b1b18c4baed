"""A router with API keys: strangers get nowhere, callers get what their keys allow."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from stagecoach import errors
from stagecoach.security.api_keys import Grant, new_entry, new_key, write_entry
from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1.inference_pb2_grpc import InferenceStub
from stagecoach_client import AsyncClient
from tests.cluster import start_router, start_shard, wait_until_ready

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
RELOAD_TIMEOUT_S = 30.0
PROMPT = list(range(100))


class KeyedCluster:
    """One shard and a router that wants a key."""

    def __init__(self, address, path, stack):
        self.address = address
        self._path = path
        self._stack = stack

    def write(self, text):
        self._path.write_text(text)

    def add(self, name, **limits):
        """A new key of `name`; the router has it soon."""
        key = new_key()
        self.write(self._path.read_text() + write_entry(new_entry(key, name, Grant(**limits))))
        return key

    async def client(self, key=""):
        return await self._stack.enter_async_context(AsyncClient(self.address, max_retries=0, api_key=key))


@asynccontextmanager
async def keyed_cluster(model, folder, monkeypatch, **grants):
    """The cluster, and a client for each of `grants` by the caller's name."""
    keys = {name: new_key() for name in ("operator", *grants)}
    path = folder / "keys.toml"
    path.write_text("".join(write_entry(new_entry(keys[name], name, grants.get(name, Grant()))) for name in keys))
    monkeypatch.delenv("STAGECOACH_API_KEY", raising=False)
    shard = start_shard(model, "0:4")
    router = start_router([shard.address], api_keys=path)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(shard.close)
        stack.push_async_callback(router.close)
        cluster = KeyedCluster(router.address, path, stack)
        clients = {name: await cluster.client(keys[name]) for name in keys}
        await wait_until_ready(clients.pop("operator"), router, shard)
        yield cluster, keys, clients


async def generate(client, num_tokens=4, token_ids=PROMPT, **options):
    return await client.generate(
        token_ids=token_ids, max_tokens=num_tokens, ignore_eos=True, temperature=0.0, **options
    )


async def eventually(attempt, expected):
    """Returns when `attempt` raises `expected`, or, for None, nothing."""
    async with asyncio.timeout(RELOAD_TIMEOUT_S):
        while True:
            try:
                await attempt()
            except errors.StagecoachError as error:
                if expected is not None and isinstance(error, expected):
                    return
            else:
                if expected is None:
                    return
            await asyncio.sleep(0.05)


async def test_strangers_get_nowhere(tiny_model, tmp_path, monkeypatch, caplog):
    methods = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
    others = ["/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/a/b"]
    async with (
        keyed_cluster(tiny_model, tmp_path, monkeypatch) as (cluster, keys, _),
        grpc.aio.insecure_channel(cluster.address) as channel,
    ):
        wrong = keys["operator"][:-4] + "0000"
        for metadata in (None, [("authorization", f"Bearer {wrong}")], [("authorization", keys["operator"])]):
            for method in [*methods, *others]:
                # No message of any kind: who gets an answer about its bytes has had them read.
                call = channel.unary_stream(method)(b"\xff" * 100, metadata=metadata, timeout=20)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await anext(aiter(call))
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
                assert type(errors.from_rpc_error(caught.value, "h:1")) is errors.Unauthenticated
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
        assert len(told) == 1  # for all of them, as they come from one host
        assert "refused ipv4:127.0.0.1:" in told[0]
        assert keys["operator"][-12:-4] not in caplog.text
        health = await HealthStub(channel).Check(HealthCheckRequest())
        assert health.status == HealthCheckResponse.SERVING
        for client in (await cluster.client(), await cluster.client(wrong)):
            for attempt in (partial(generate, client), client.models, client.status, partial(client.tokenize, "x")):
                with pytest.raises(errors.Unauthenticated):
                    await attempt()
        metadata = [("authorization", f"Bearer {keys['operator']}")]
        for request in (b"\xff" * 100, b"\x1a\x00" * 1_000_000):  # no message, and too much of one
            call = channel.unary_stream(methods[0])(request, metadata=metadata, timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            refused = errors.from_rpc_error(caught.value, "h:1")
            assert (type(refused), refused.field) == (errors.InvalidArgument, "request")
        good = await cluster.client(keys["operator"])
        assert (await generate(good)).usage.completion_tokens == 4
        assert len((await good.tokenize("abc")).token_ids) == 3
        assert len(await good.models()) == 1


async def test_models_and_priorities(tiny_model, tmp_path, monkeypatch):
    elsewhere, here = Grant(models=("another",)), Grant(models=(tiny_model.name,), max_priority=0)
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, ann=elsewhere, bob=here) as (_, _, clients):
        for model in ("", tiny_model.name, "unknown"):
            with pytest.raises(errors.PermissionDenied) as caught:
                await generate(clients["ann"], model=model)
            assert caught.value.field == "model"
        with pytest.raises(errors.PermissionDenied):
            await clients["ann"].tokenize("x")
        with pytest.raises(errors.NotFound):
            await generate(clients["ann"], model="another")
        assert await clients["ann"].models() == ()
        assert [model.name for model in await clients["bob"].models()] == [tiny_model.name]
        await generate(clients["bob"], model=tiny_model.name, priority=0)
        with pytest.raises(errors.PermissionDenied) as caught:
            await generate(clients["bob"], priority=1)
        assert (caught.value.field, caught.value.limit) == ("priority", "0")


async def test_limits_are_each_callers_own(tiny_model, tmp_path, monkeypatch):
    grants = {
        "ann": Grant(requests_per_minute=2),
        "bob": Grant(tokens_per_minute=120),
        "cat": Grant(max_concurrent=1),
        "dan": Grant(tokens_per_minute=120),
    }
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, **grants) as (_, _, clients):
        await generate(clients["ann"])
        await clients["ann"].tokenize("x")
        with pytest.raises(errors.RateLimited) as caught:
            await generate(clients["ann"])
        assert caught.value.field == "requests_per_minute"
        assert 0 < caught.value.retry_after_s <= 30.1

        await generate(clients["bob"], num_tokens=40)  # 100 of the prompt, and 40: 20 more than there were
        with pytest.raises(errors.RateLimited) as caught:
            await generate(clients["bob"])
        assert caught.value.field == "tokens_per_minute"
        assert 0 < caught.value.retry_after_s <= 10.6

        with pytest.raises(errors.OutOfRange):  # told from its bytes, which is no work
            await clients["dan"].tokenize("x" * 600)
        await clients["dan"].tokenize("x" * 200)  # 80 more than there were
        for more in (partial(clients["dan"].tokenize, "x"), partial(generate, clients["dan"])):
            with pytest.raises(errors.RateLimited) as caught:
                await more()
            assert caught.value.field == "tokens_per_minute"

        stream = await generate(clients["cat"], num_tokens=300, stream=True)
        await anext(stream)
        with pytest.raises(errors.RateLimited) as caught:
            await generate(clients["cat"])
        assert caught.value.field == "max_concurrent"
        await stream.aclose()
        await eventually(lambda: generate(clients["cat"]), None)


async def test_completions_count_each_and_so_does_a_request_that_is_asked_for_again(tiny_model, tmp_path, monkeypatch):
    grants = {"ann": Grant(max_concurrent=2), "bob": Grant(requests_per_minute=1)}
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, **grants) as (_, _, clients):
        await generate(clients["ann"], n=2)
        with pytest.raises(errors.PermissionDenied) as caught:
            await generate(clients["ann"], n=3)
        assert (caught.value.field, caught.value.limit) == ("n", "2")

        first = await generate(clients["bob"], request_id="same")
        for _ in range(10):
            assert (await generate(clients["bob"], request_id="same")).text == first.text
        with pytest.raises(errors.RateLimited) as caught:
            await generate(clients["bob"], request_id="same")
        assert caught.value.field == "requests_per_minute"


async def test_what_runs_on_without_its_call_still_counts_and_is_its_callers_alone(tiny_model, tmp_path, monkeypatch):
    grants = {"ann": Grant(max_concurrent=1), "bob": Grant()}
    async with (
        keyed_cluster(tiny_model, tmp_path, monkeypatch, **grants) as (cluster, keys, clients),
        grpc.aio.insecure_channel(cluster.address) as channel,
    ):
        stub = InferenceStub(channel)
        headers = {name: [("authorization", f"Bearer {key}")] for name, key in keys.items()}
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT),
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True),
            request_id="same",
            linger_s=60.0,
        )
        call = stub.Generate(request, metadata=headers["ann"])
        await anext(aiter(call))
        call.cancel()
        with pytest.raises(errors.RateLimited):
            await generate(clients["ann"])
        # Not hers: with other content under her id, the first would be refused, and the second would end it.
        await generate(clients["bob"], request_id="same")
        await stub.Cancel(pb.CancelRequest(request_id="same"), metadata=headers["bob"])
        with pytest.raises(errors.RateLimited):
            await generate(clients["ann"])
        await stub.Cancel(pb.CancelRequest(request_id="same"), metadata=headers["ann"])
        await generate(clients["ann"])


async def test_the_file_is_read_again_when_it_changes(tiny_model, tmp_path, monkeypatch):
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, ann=Grant()) as (cluster, keys, clients):
        newcomer = await cluster.client(cluster.add("bob"))
        await eventually(newcomer.models, None)
        await clients["ann"].models()
        stream = await generate(clients["ann"], num_tokens=200, stream=True)
        await anext(stream)
        cluster.write(write_entry(new_entry(keys["operator"], "operator", Grant())))
        await eventually(newcomer.models, errors.Unauthenticated)
        with pytest.raises(errors.Unauthenticated):
            await clients["ann"].models()
        answer = await stream.collect()  # what was let in goes to its end
        assert answer.usage.completion_tokens == 200


async def test_callers_share_no_prefix_unless_they_want_to(tiny_model, tmp_path, monkeypatch):
    sharing = Grant(shares_cache=True)
    grants = {"ann": Grant(), "bob": Grant(), "cat": sharing, "dan": sharing}
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, **grants) as (_, _, clients):

        async def cached(name, **options):
            answer = await generate(clients[name], **options)
            return answer.usage.cached_tokens

        assert await cached("ann") == 0
        assert await cached("ann") == 96
        assert await cached("bob") == 0
        assert await cached("bob") == 96
        assert await cached("ann", cache_salt="x") == 0
        assert await cached("ann", cache_salt="x") == 96
        assert await cached("bob", cache_salt="x") == 0
        assert await cached("cat") == 0
        assert await cached("dan") == 96
        answer = await generate(clients["bob"], token_ids=PROMPT[::-1], n=3)  # completions of one request still share
        assert answer.usage.cached_tokens <= 96
        assert await cached("bob", token_ids=PROMPT[::-1]) == 96


async def test_neither_keys_nor_prompts_nor_outputs_are_logged(tiny_model, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    prompt = "the secret of the prompt "
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, ann=Grant(requests_per_minute=4)) as (
        cluster,
        keys,
        clients,
    ):
        ann = clients["ann"]
        answer = await ann.generate(prompt, max_tokens=60, ignore_eos=True, stop=["never in the output"], logprobs=2)
        messages = [{"role": "stranger", "content": prompt}]
        for wrong in ({"messages": messages}, {"prompt": prompt * 100}, {"prompt": prompt, "max_tokens": 10**6}):
            with pytest.raises(errors.StagecoachError):
                await ann.generate(**wrong)
        with pytest.raises(errors.RateLimited):
            await ann.generate(prompt)
        stranger = await cluster.client(keys["ann"] + "x")
        with pytest.raises(errors.Unauthenticated):
            await stranger.generate(prompt)
        status = repr(await (await cluster.client(keys["operator"])).status())
        cluster.write("[[keys]]\nname = ")
        async with asyncio.timeout(RELOAD_TIMEOUT_S):
            while "API keys stay as they were" not in caplog.text:
                await asyncio.sleep(0.05)
    assert len(answer.text) > 20
    shown = capfd.readouterr()
    said = caplog.text + shown.out + shown.err + status
    assert "ready" in said
    for secret in (prompt.strip(), answer.text, answer.text[:20], keys["ann"], keys["ann"].split("_", 2)[2]):
        assert secret not in said
    assert repr(list(answer.completions[0].token_ids[:8]))[1:-1] not in said
