"""The real model, split over two processes, says what transformers says."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagecoach_client import AsyncClient, Client
from stagecoach_local import LocalCluster

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain gravity to a child.",
    "List three prime numbers and say why they are prime.",
    "Translate 'good morning' into Spanish, German and Italian.",
    "Was ist der höchste Berg der Welt? 🏔",
    "Write a Python function that reverses a string.",
    "Tell me a story about a fox and a coach that never stops.",
    "What is 17 + 25?",
    "Summarise the plot of Romeo and Juliet.",
)
NUM_TOKENS = 128

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def cluster(smollm2):
    with LocalCluster(
        smollm2, stages="0:15,15:30", dtype="float32", threads_per_shard=1, kv_cache_memory="256M"
    ) as cluster:
        yield cluster


def test_128_greedy_tokens_of_ten_prompts_are_transformers_tokens(cluster, smollm2):
    async def ask(messages):
        async with AsyncClient(cluster.address) as client:
            tokenized = [await client.tokenize(messages=each) for each in messages]
            answers = await asyncio.gather(
                *(
                    client.generate(messages=each, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
                    for each in messages
                )
            )
            return tokenized, answers

    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    tokenized, answers = asyncio.run(ask(messages))
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, tokens, answer in zip(messages, tokenized, answers, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(tokens.token_ids) == ids, prompt
        generated = answer.completions[0].token_ids
        assert len(generated) == NUM_TOKENS
        assert likeliest_next_tokens(model, [*ids, *generated])[len(ids) - 1 : -1] == list(generated), prompt


@torch.inference_mode()
def likeliest_next_tokens(model, token_ids):
    """The token that is likeliest after each of these and those before it.

    If that is the one that follows, all the way, the tokens are those of a greedy decoding: each is the likeliest after
    its predecessors, which are. One pass for the whole sequence says so sooner than a step for each of its tokens.
    """
    return model(torch.tensor([token_ids])).logits[0].argmax(dim=-1).tolist()


def test_the_capital_of_france_is_paris_and_the_layers_are_in_two_processes(cluster):
    with Client(cluster.address) as client:
        answer = client.generate(messages=[{"role": "user", "content": PROMPTS[0]}], temperature=0)
        stages = client.status().pipelines[0].stages
    assert "Paris" in answer.text
    assert answer.completions[0].finish_reason == "stop"
    assert [(stage.first_layer, stage.end_layer) for stage in stages] == [(0, 15), (15, 30)]
    assert len({stage.pid for stage in stages}) == 2
    assert {stage.pid for stage in stages} == {process.pid for process in cluster.processes if process.layers}
