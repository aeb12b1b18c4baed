"""Rows whose candidates did not determine the token are computed again, with the same tokens in the end."""

import pytest

from stagecoach_router.sampling import outputs
from tests.cluster import cluster
from tests.tiny_model import random_prompts

SAMPLED = {"temperature": 3.0, "seed": 11, "max_tokens": 40, "ignore_eos": True}


async def tokens_and_repeats(tiny_model):
    async with cluster(tiny_model) as client:
        answer = await client.generate(token_ids=random_prompts(1, 20)[0], **SAMPLED)
        return answer.completions[0].token_ids, (await client.status()).num_repeats


@pytest.mark.parametrize("more", [20, 260], ids=["more candidates first", "the row at once"])
async def test_repeats_do_not_change_the_tokens(tiny_model, monkeypatch, more):
    monkeypatch.setattr(outputs, "OPEN_CANDIDATES", 130)  # half of the vocabulary: whole rows from the start
    expected, none = await tokens_and_repeats(tiny_model)
    assert none == 0
    monkeypatch.setattr(outputs, "OPEN_CANDIDATES", 4)
    monkeypatch.setattr(outputs, "MORE_CANDIDATES", more)
    tokens, repeats = await tokens_and_repeats(tiny_model)
    assert tokens == expected
    assert repeats > 0
