"""Requests through a whole cluster: the tokens are the reference's, whatever else happens around them."""

import asyncio
import math

import pytest
import torch

from stagecoach import errors
from stagecoach.sampling_params import SamplingParams
from tests.cluster import cluster
from tests.tiny_model import greedy, random_prompts, reference_tokens

PROMPT = "The stagecoach left at dawn, "
SPLITS = {
    "one": ["0:4"],
    "two": ["0:2", "2:4"],
    "uneven": ["0:3", "3:4"],
    "three": ["0:1", "1:3", "3:4"],
    "four": ["0:1", "1:2", "2:3", "3:4"],
}


@pytest.mark.parametrize("ranges", SPLITS.values(), ids=SPLITS.keys())
async def test_greedy_tokens_are_the_references_however_the_layers_are_split(tiny_model, reference, ranges):
    prompts = random_prompts(3, 40)
    async with cluster(tiny_model, ranges) as client:
        answers = await asyncio.gather(*(client.generate(token_ids=prompt, **greedy(12)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 12)
        assert answer.completions[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (40, 12)


async def test_a_prompt_in_chunks_beside_others_that_decode(tiny_model, reference):
    prompts = random_prompts(6, 90) + random_prompts(2, 3, seed=1)
    async with cluster(tiny_model, max_batch_tokens=16) as client:
        answers = await asyncio.gather(*(client.generate(token_ids=prompt, **greedy(20)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 20)


async def test_when_blocks_run_out_sequences_are_preempted_and_lose_nothing(tiny_model, reference):
    prompts = random_prompts(8, 30)
    async with cluster(tiny_model, kv_blocks=12) as client:
        answers = await asyncio.gather(*(client.generate(token_ids=prompt, **greedy(60)) for prompt in prompts))
        status = await client.status()
    assert status.num_preemptions > 0
    assert status.num_free_blocks == status.num_blocks == 12
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 60)


async def test_a_second_request_finds_the_prompt_in_the_prefix_cache(tiny_model, reference):
    prompt = random_prompts(1, 100)[0]
    async with cluster(tiny_model) as client:
        first = await client.generate(token_ids=prompt, **greedy(8))
        second = await client.generate(token_ids=prompt, **greedy(8))
        longer = await client.generate(token_ids=[*prompt, 1, 2, 3], **greedy(8))
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 96
    assert first.completions[0].token_ids == second.completions[0].token_ids == reference_tokens(reference, prompt, 8)
    assert longer.completions[0].token_ids == reference_tokens(reference, [*prompt, 1, 2, 3], 8)


async def test_completions_of_one_prompt_share_its_blocks_and_differ_by_their_randomness(tiny_model):
    prompt = random_prompts(1, 64)[0]
    async with cluster(tiny_model) as client:
        answer = await client.generate(token_ids=prompt, n=4, temperature=1.5, seed=7, max_tokens=10, ignore_eos=True)
        again = await client.generate(token_ids=prompt, n=4, temperature=1.5, seed=7, max_tokens=10, ignore_eos=True)
        status = await client.status()
    assert [completion.index for completion in answer.completions] == [0, 1, 2, 3]
    assert len({completion.token_ids for completion in answer.completions}) > 1
    assert again.completions == answer.completions
    assert status.cached_prompt_tokens >= 3 * 48


SAMPLED = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "bias": {"logit_bias": {65: 4.0, 66: -4.0}},
    "logprobs": {"logprobs": 5},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "logprobs": 2,
    },
}


async def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(tiny_model):
    prompts = random_prompts(len(SAMPLED), 20)
    requests = [
        {"token_ids": prompt, "seed": 11, "max_tokens": 24, "ignore_eos": True} | params
        for prompt, params in zip(prompts, SAMPLED.values(), strict=True)
    ]
    async with cluster(tiny_model) as client:
        alone = [await client.generate(**request) for request in requests]
    async with cluster(tiny_model, ["0:3", "3:4"], max_batch_tokens=24, kv_blocks=20) as client:
        together = await asyncio.gather(*(client.generate(**request) for request in requests))
    for name, one, other in zip(SAMPLED, alone, together, strict=True):
        assert one.completions[0].token_ids == other.completions[0].token_ids, name


async def test_logprobs_are_the_log_softmax_of_the_references_logits(tiny_model, reference):
    prompt = random_prompts(1, 10)[0]
    async with cluster(tiny_model) as client:
        answer = await client.generate(token_ids=prompt, seed=3, max_tokens=5, ignore_eos=True, logprobs=4)
    tokens = list(prompt)
    assert len(answer.completions[0].logprobs) == 5
    for position in answer.completions[0].logprobs:
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert position.chosen.logprob == pytest.approx(float(expected[position.chosen.token_id]), abs=1e-3)
        assert [entry.token_id for entry in position.top] == expected.topk(4).indices.tolist()
        assert [entry.logprob for entry in position.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-3)
        tokens.append(position.chosen.token_id)


async def test_streamed_pieces_make_the_whole(tiny_model):
    async with cluster(tiny_model) as client:
        whole = await client.generate(PROMPT, **greedy(40))
        chunks = [chunk async for chunk in await client.generate(PROMPT, stream=True, **greedy(40))]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.completions[0].token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 40


async def test_a_stop_string_ends_the_text_before_it_also_across_tokens(tiny_model):
    async with cluster(tiny_model) as client:
        free = await client.generate(PROMPT, **greedy(40, logit_bias=dict.fromkeys(range(64, 90), 50.0)))
        stop = free.text[7:10]  # every token is one character here
        stopped = await client.generate(
            PROMPT, **greedy(40, stop=[stop], logit_bias=dict.fromkeys(range(64, 90), 50.0))
        )
    assert len(stop) == 3
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.completions[0].finish_reason == "stop"


async def test_a_stop_token_and_the_end_of_sequence_end_a_completion(tiny_model):
    async with cluster(tiny_model) as client:
        by_id = await client.generate(PROMPT, temperature=0, max_tokens=20, stop_token_ids=[33], logit_bias={33: 100.0})
        by_eos = await client.generate(PROMPT, temperature=0, max_tokens=20, logit_bias={256: 100.0})
        ignored = await client.generate(PROMPT, **greedy(20, logit_bias={256: 100.0}))
    for answer in (by_id, by_eos):
        assert answer.completions[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == 1
        assert answer.text == ""
    assert ignored.usage.completion_tokens == 20


async def test_chat_goes_through_the_checkpoints_template(tiny_model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé 🐎"}]
    text = "<|system|>Be brief.<|end|><|user|>Hé 🐎<|end|><|assistant|>"
    async with cluster(tiny_model) as client:
        tokens = await client.tokenize(messages=messages)
        assert tokens.token_ids == (await client.tokenize(text)).token_ids
        by_messages = await client.generate(messages=messages, **greedy(5))
        by_tokens = await client.generate(token_ids=tokens.token_ids, **greedy(5))
        with pytest.raises(errors.InvalidArgument, match="unknown role") as caught:
            await client.generate(messages=[{"role": "horse", "content": "neigh"}])
    assert caught.value.field == "messages"
    assert by_messages.completions == by_tokens.completions


LIMIT = 512
BAD = {
    "empty prompt": ({"token_ids": []}, errors.OutOfRange, "prompt", str(LIMIT)),
    "long prompt": ({"token_ids": [1] * LIMIT}, errors.OutOfRange, "prompt", str(LIMIT)),
    "token outside the vocabulary": ({"token_ids": [1, 260]}, errors.InvalidArgument, "token_ids", "260"),
    "too many tokens wanted": ({"token_ids": [1] * 500, "max_tokens": 13}, errors.OutOfRange, "max_tokens", "12"),
    "bias outside the vocabulary": (
        {"prompt": "a", "logit_bias": {260: 1.0}},
        errors.InvalidArgument,
        "logit_bias",
        "260",
    ),
    "stop token outside the vocabulary": (
        {"prompt": "a", "stop_token_ids": [9999]},
        errors.InvalidArgument,
        "stop_token_ids",
        "260",
    ),
    "unknown model": ({"prompt": "a", "model": "gpt-9"}, errors.NotFound, "model", ""),
    "temperature not a number": (
        {"prompt": "a", "temperature": math.nan},
        errors.InvalidArgument,
        "temperature",
        "[0, 100]",
    ),
    "top_p out of range": ({"prompt": "a", "top_p": 1.5}, errors.InvalidArgument, "top_p", "(0, 1]"),
    "stop list too long": ({"prompt": "a", "stop": ["x"] * 17}, errors.InvalidArgument, "stop", "16"),
    "no messages": ({"messages": []}, errors.InvalidArgument, "messages", ""),
}


async def test_bad_input_gets_a_typed_error_and_touches_no_other_request(tiny_model, reference):
    prompt = random_prompts(1, 12)[0]
    async with cluster(tiny_model) as client:
        other = asyncio.create_task(client.generate(token_ids=prompt, **greedy(150)))
        for name, (request, kind, field, limit) in BAD.items():
            with pytest.raises(kind) as caught:
                await client.generate(**request)
            assert caught.value.field == field, name
            if limit:
                assert caught.value.limit == limit, name
        assert (await other).completions[0].token_ids == reference_tokens(reference, prompt, 150)
        status = await client.status()
        assert (status.num_running, status.num_waiting) == (0, 0)
        assert status.num_free_blocks == status.num_blocks


async def test_the_server_checks_what_the_sdk_would_not_have_sent(tiny_model, monkeypatch):
    """Another client may send anything: the same checks stand on the server."""
    async with cluster(tiny_model) as client:
        monkeypatch.setattr(SamplingParams, "__post_init__", lambda self: None)
        bad = client.generate("a", top_p=1.5)
        task = asyncio.ensure_future(bad)
        await asyncio.sleep(0)  # the request is built in this step
        monkeypatch.undo()
        with pytest.raises(errors.InvalidArgument) as caught:
            await task
    assert caught.value.field == "top_p"


async def test_a_request_that_can_never_fit_is_refused_at_the_door(tiny_model):
    async with cluster(tiny_model, kv_blocks=4) as client:
        with pytest.raises(errors.OutOfRange) as caught:
            await client.generate(token_ids=[1] * 60, max_tokens=10)
        assert caught.value.limit
        fits = await client.generate(token_ids=[1] * 54, temperature=0, ignore_eos=True)
        assert fits.usage.completion_tokens == 10


async def test_a_full_queue_refuses_with_a_hint(tiny_model):
    async with cluster(tiny_model, max_running=1, max_waiting=2) as client:
        running = [asyncio.create_task(client.generate(PROMPT, **greedy(300))) for _ in range(3)]
        async with asyncio.timeout(20):
            while (await client.status()).num_waiting < 2:
                await asyncio.sleep(0.005)
        with pytest.raises(errors.Overloaded) as caught:
            await client.generate(PROMPT, n=2, **greedy(3))
        assert caught.value.retry_after_s > 0
        assert len({answer.text for answer in await asyncio.gather(*running)}) == 1


async def test_a_thousand_clients_that_vanish_leave_every_block_free(tiny_model, reference):
    prompts = random_prompts(50, 40)
    async with cluster(tiny_model, max_running=64) as client:

        async def vanish(prompt, num_chunks):
            async with await client.generate(token_ids=prompt, stream=True, **greedy(400)) as stream:
                for _ in range(num_chunks):
                    await anext(stream)

        for batch in range(20):
            await asyncio.gather(*(vanish(prompt, (batch + index) % 4) for index, prompt in enumerate(prompts)))
        async with asyncio.timeout(20):
            while (status := await client.status()).num_running or status.num_waiting:
                await asyncio.sleep(0.01)
        assert status.num_free_blocks == status.num_blocks
        answer = await client.generate(token_ids=prompts[0], **greedy(10))
    assert answer.completions[0].token_ids == reference_tokens(reference, prompts[0], 10)
