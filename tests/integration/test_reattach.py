"""One request, several calls: what was sent twice is computed once, and a stream survives its connection."""

import asyncio

import grpc
import pytest

from stagecoach import errors
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client import AsyncClient
from stagecoach_router.requests import output_stream
from tests.cluster import cluster, start_router, start_shard, status_becomes, wait_until_ready
from tests.delay_proxy import DelayProxy
from tests.held_stage import held_stages
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 30.0


@pytest.fixture
async def client(tiny_model):
    async with cluster(tiny_model, ["0:4"], max_linger_s=60.0) as client:
        yield client


async def until_idle(client):
    """How many tokens the cluster has generated, once nothing runs."""
    async with asyncio.timeout(TIMEOUT_S):
        while (status := await client.status()).num_running:
            await asyncio.sleep(0.01)
    assert status.num_free_blocks == status.num_blocks
    return status.completion_tokens


async def test_the_same_submit_twice_is_computed_once(client, reference):
    prompt = random_prompts(1, 20)[0]
    submit = {"token_ids": prompt, "request_id": "mine", **greedy(40)}
    first, second = await asyncio.gather(client.generate(**submit), client.generate(**submit))
    remembered = await client.generate(**submit)
    assert first.completions == second.completions == remembered.completions
    assert first.completions[0].token_ids == reference_tokens(reference, prompt, 40)
    assert await until_idle(client) == 40


async def test_without_a_seed_the_second_call_still_gets_the_firsts_tokens(client):
    submit = {"prompt": "Once", "request_id": "mine", "max_tokens": 30, "ignore_eos": True, "n": 2, "logprobs": 2}
    assert (await client.generate(**submit)).completions == (await client.generate(**submit)).completions


async def test_the_id_of_another_request_is_refused(client):
    await client.generate("one", request_id="mine", **greedy(2))
    for changed in ({"prompt": "two"}, {"prompt": "one", "seed": 1}):
        with pytest.raises(errors.FailedPrecondition, match="'mine' is the id of another request") as caught:
            await client.generate(request_id="mine", **changed, **greedy(2))
        assert caught.value.field == "request_id"


async def call(client, timeout_s=TIMEOUT_S, **changes):
    """A call as the wire has it."""
    request = pb.GenerateRequest(prompt="Hello", request_id="mine")
    request.sampling.max_tokens, request.sampling.temperature, request.sampling.ignore_eos = 30, 0.0, True
    request.MergeFrom(pb.GenerateRequest(**changes))
    return (await client._connected()).Generate(request, timeout=timeout_s)


async def token_ids(responses):
    return [token_id async for response in responses for token_id in response.token_ids]


async def token_ids_until_error(responses):
    with pytest.raises(grpc.aio.AioRpcError):
        await token_ids(responses)


async def test_a_call_reads_from_the_token_it_asks_for(client):
    everything = await token_ids(await call(client))
    assert len(everything) == 30
    for start in (0, 1, 17, 29, 30, 31):
        assert await token_ids(await call(client, from_tokens=[start])) == everything[start:]


async def test_a_call_without_a_deadline_is_as_good(client):
    request = pb.GenerateRequest(prompt="Hello")
    request.sampling.max_tokens, request.sampling.ignore_eos = 5, True
    assert len(await token_ids((await client._connected()).Generate(request))) == 5


async def test_the_text_from_a_token_on_is_the_rest_of_the_text(client):
    whole = "".join([response.text async for response in await call(client)])
    for start in range(0, 30, 7):
        head, num_tokens = "", 0
        responses = await call(client)
        async for response in responses:
            head += response.text
            num_tokens += len(response.token_ids)
            if num_tokens > start:
                break
        responses.cancel()
        rest = "".join([response.text async for response in await call(client, from_tokens=[num_tokens])])
        assert head + rest == whole


async def test_what_is_not_known_cannot_be_gone_on_with(client):
    with pytest.raises(Exception, match="not known here") as caught:
        await token_ids(await call(client, request_id="unheard of", from_tokens=[3]))
    assert errors.from_rpc_error(caught.value, "router").field == "from_tokens"


@pytest.mark.parametrize("changes", [{"linger_s": -1.0}, {"linger_s": float("nan")}, {"from_tokens": [0] * 65}])
async def test_what_cannot_be_is_refused(client, changes):
    with pytest.raises(Exception, match=next(iter(changes))) as caught:
        await token_ids(await call(client, **changes))
    assert isinstance(errors.from_rpc_error(caught.value, "router"), errors.InvalidArgument)


async def test_a_request_that_lingers_is_there_for_the_next_call_and_not_for_ever(client, monkeypatch):
    sampling = pb.SamplingParams(max_tokens=400)
    with held_stages(monkeypatch) as goes_on:
        first = await call(client, sampling=sampling, linger_s=30.0)
        head = list((await first.read()).token_ids)
        goes_on.clear()
        first.cancel()
        second = await call(client, sampling=sampling, from_tokens=[len(head)], linger_s=0.05)
        goes_on.set()
        rest = list((await second.read()).token_ids)
        goes_on.clear()
        assert (await client.status()).num_running == 1
        second.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while (await client.status()).num_running:
                await asyncio.sleep(0.01)
        goes_on.set()
    assert len(head) >= 1
    assert len(rest) >= 1
    assert await until_idle(client) < 400


async def test_a_call_with_a_short_deadline_ends_itself_and_not_the_request_of_another(client, monkeypatch):
    with held_stages(monkeypatch) as goes_on:
        first = aiter(await call(client))
        head = list((await anext(first)).token_ids)
        goes_on.clear()
        second = await call(client, timeout_s=0.05)
        await token_ids_until_error(second)
        assert await second.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        goes_on.set()
        assert len(head) + len(await token_ids(first)) == 30


async def test_a_caller_comes_back_however_much_has_come_meanwhile(client, monkeypatch):
    monkeypatch.setattr(output_stream, "MAX_UNREAD_DELTAS", 8)
    sampling = pb.SamplingParams(max_tokens=200)
    with held_stages(monkeypatch) as goes_on:
        first = await call(client, sampling=sampling, linger_s=60.0)
        head = list((await first.read()).token_ids)
        first.cancel()
        await status_becomes(client, lambda status: status.completion_tokens > len(head) + 20)
        goes_on.clear()
        second = aiter(await call(client, sampling=sampling, from_tokens=[len(head)]))
        rest = list((await anext(second)).token_ids)
        goes_on.set()
        rest += await token_ids(second)
    assert len(head) + len(rest) == 200


async def test_closing_a_lingering_stream_ends_its_request_at_once(client, monkeypatch):
    with held_stages(monkeypatch) as goes_on:
        async with await client.generate("Hello", stream=True, linger_s=60.0, **greedy(400)) as stream:
            await anext(stream)
            goes_on.clear()
        assert (await client.status()).num_running == 0


def assert_same(before, after):
    """The same answer; its log-probabilities as nearly as float32 gives them in another batch."""
    assert len(before.completions) == len(after.completions)
    for one, other in zip(before.completions, after.completions, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert [each.chosen.token_id for each in one.logprobs] == [each.chosen.token_id for each in other.logprobs]
        assert [each.chosen.logprob for each in one.logprobs] == pytest.approx(
            [each.chosen.logprob for each in other.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
async def test_a_stream_survives_its_connection(tiny_model, monkeypatch, kind):
    options = (
        greedy(200) if kind == "greedy" else {"max_tokens": 200, "ignore_eos": True, "top_k": 3, "n": 2, "logprobs": 1}
    )
    prompt = random_prompts(1, 20)[0]
    shard = start_shard(tiny_model, "0:4")
    router = start_router([shard.address])
    proxy = DelayProxy(router.address)
    await proxy.start()
    async with (
        AsyncClient(router.address) as beside,
        AsyncClient(proxy.address) as client,
        asyncio.timeout(TIMEOUT_S),
    ):
        await wait_until_ready(beside, router, shard)
        undisturbed = await beside.generate(token_ids=prompt, seed=5, **options)
        with held_stages(monkeypatch) as goes_on:
            stream = await client.generate(token_ids=prompt, seed=5, stream=True, linger_s=30.0, **options)
            for _ in range(3):
                await anext(stream)
                goes_on.clear()
                await proxy.close()
                proxy = DelayProxy(router.address, listen=proxy.address)
                await proxy.start()
                goes_on.set()
            answer = await stream.collect()
        assert_same(undisturbed, answer)
        assert (await beside.status()).completion_tokens == 2 * undisturbed.usage.completion_tokens
    await proxy.close()
    await router.close()
    await shard.close()
