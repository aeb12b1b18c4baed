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
def expected(smollm2):
    """Greedy tokens of transformers in float32, end-of-sequence ignored; and its tokenizer's ids of the prompts."""
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    answers = {}
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        answers[prompt] = tuple(ids[0].tolist()), tuple(output[0, ids.shape[1] :].tolist())
    torch.set_num_threads(1)
    return answers


@pytest.fixture(scope="module")
def cluster(smollm2, expected):
    """After `expected`, so that the two do not compete for the cores."""
    with LocalCluster(
        smollm2, stages="0:15,15:30", dtype="float32", threads_per_shard=1, kv_cache_memory="256M"
    ) as cluster:
        yield cluster


def test_128_greedy_tokens_of_ten_prompts_are_transformers_tokens(cluster, expected):
    async def ask():
        async with AsyncClient(cluster.address) as client:
            tokenized = [await client.tokenize(messages=[{"role": "user", "content": prompt}]) for prompt in expected]
            answers = await asyncio.gather(
                *(
                    client.generate(
                        messages=[{"role": "user", "content": prompt}],
                        temperature=0,
                        max_tokens=NUM_TOKENS,
                        ignore_eos=True,
                    )
                    for prompt in expected
                )
            )
            return tokenized, answers

    tokenized, answers = asyncio.run(ask())
    for (prompt, (prompt_ids, token_ids)), tokens, answer in zip(expected.items(), tokenized, answers, strict=True):
        assert tokens.token_ids == prompt_ids, prompt
        assert answer.completions[0].token_ids == token_ids, prompt


def test_the_capital_of_france_is_paris_and_the_layers_are_in_two_processes(cluster):
    with Client(cluster.address) as client:
        answer = client.generate(messages=[{"role": "user", "content": PROMPTS[0]}], temperature=0)
        stages = client.status().pipelines[0].stages
    assert "Paris" in answer.text
    assert answer.completions[0].finish_reason == "stop"
    assert [(stage.first_layer, stage.end_layer) for stage in stages] == [(0, 15), (15, 30)]
    assert len({stage.pid for stage in stages}) == 2
    assert {stage.pid for stage in stages} == {process.pid for process in cluster.processes if process.layers}
