"""A call's deadline ends its request on the router, also one that would go on without its caller."""

import pytest

from stagecoach import errors
from tests.cluster import cluster, status_becomes
from tests.held_stage import held_stages
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 30.0
# It would be noticed: none of these requests may outlive its deadline by so long.
LINGER_S = 60.0


async def test_one_that_waits_leaves_the_line_and_one_that_runs_its_blocks(tiny_model, reference, monkeypatch):
    prompts = random_prompts(3, 20)
    async with cluster(tiny_model, ["0:4"], max_running=2) as client:
        with held_stages(monkeypatch) as goes_on:
            stays = await client.generate(token_ids=prompts[0], stream=True, **greedy(60))
            await anext(stays)
            runs = await client.generate(
                token_ids=prompts[1], stream=True, timeout_s=1.0, linger_s=LINGER_S, **greedy(400)
            )
            await anext(runs)
            goes_on.clear()
            waits = await client.generate(
                token_ids=prompts[2], stream=True, timeout_s=0.5, linger_s=LINGER_S, **greedy(60)
            )
            await status_becomes(client, lambda status: status.num_waiting == 1)
            for stream in (waits, runs):
                with pytest.raises(errors.DeadlineExceeded):
                    await stream.collect()
            await status_becomes(client, lambda status: (status.num_waiting, status.num_running) == (0, 1))
            goes_on.set()
            answer = await stays.collect()
        assert answer.completions[0].token_ids == reference_tokens(reference, prompts[0], 60)
        status = await client.status()
        assert (status.num_running, status.num_free_blocks) == (0, status.num_blocks)


async def test_a_prompt_in_the_middle_of_its_prefill_is_given_up(tiny_model, monkeypatch):
    async with cluster(tiny_model, ["0:4"], max_batch_tokens=16, lanes=1) as client:
        with held_stages(monkeypatch) as goes_on:
            goes_on.clear()
            stream = await client.generate(
                token_ids=random_prompts(1, 300)[0], stream=True, timeout_s=0.5, linger_s=LINGER_S, **greedy(9)
            )
            await status_becomes(client, lambda status: status.num_running == 1)
            with pytest.raises(errors.DeadlineExceeded):
                await stream.collect()
            await status_becomes(client, lambda status: status.num_running == 0)
        before = (await client.status()).num_results
        await client.generate(token_ids=[1, 2, 3], **greedy(1))
        status = await client.status()
        assert status.num_results <= before + 2, "the chunk that was under way, and this request's"
        assert status.num_free_blocks == status.num_blocks
