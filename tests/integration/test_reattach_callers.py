"""A request id is its caller's own: with another API key it names another request, or none."""

import pytest

from stagecoach import errors
from stagecoach.security.api_keys import Grant
from stagecoach.v1 import inference_pb2 as pb
from tests.held_stage import held_stages
from tests.integration.test_tenants_cluster import generate, keyed_cluster

TIMEOUT_S = 60.0


async def test_one_callers_ids_mean_nothing_to_another(tiny_model, tmp_path, monkeypatch):
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, ann=Grant(), ben=Grant()) as (_, _, clients):
        ann, ben = clients["ann"], clients["ben"]
        answer = await generate(ann, token_ids=[1, 2, 3], request_id="same")
        other = await generate(ben, token_ids=[4, 5, 6], request_id="same")
        assert other.usage.prompt_tokens == 3
        assert (await generate(ann, token_ids=[1, 2, 3], request_id="same")).completions == answer.completions
        with pytest.raises(errors.FailedPrecondition):
            await generate(ann, token_ids=[4, 5, 6], request_id="same")


async def test_one_caller_cannot_read_on_or_cancel_what_another_asked(tiny_model, tmp_path, monkeypatch):
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, ann=Grant(), ben=Grant()) as (_, _, clients):
        ann, ben = clients["ann"], clients["ben"]
        with held_stages(monkeypatch) as goes_on:
            stream = await generate(ann, 40, token_ids=[1, 2, 3], request_id="anns", stream=True)
            await anext(stream)
            goes_on.clear()
            stub, options = await ben._connected(), ben._settings.call_options(TIMEOUT_S)
            await stub.Cancel(pb.CancelRequest(request_id="anns"), **options)
            request = pb.GenerateRequest(request_id="anns", token_ids=pb.TokenIds(ids=[1, 2, 3]), from_tokens=[1])
            with pytest.raises(Exception, match="not known here"):
                await stub.Generate(request, **options).read()
            goes_on.set()
            assert (await stream.collect()).usage.completion_tokens == 40


async def test_going_on_with_a_request_takes_nothing_off_the_requests_of_the_minute(tiny_model, tmp_path, monkeypatch):
    grants = {"ann": Grant(requests_per_minute=1)}
    async with keyed_cluster(tiny_model, tmp_path, monkeypatch, **grants) as (_, _, clients):
        for _ in range(3):
            await generate(clients["ann"], request_id="mine")
        with pytest.raises(errors.RateLimited):
            await generate(clients["ann"], request_id="another")
