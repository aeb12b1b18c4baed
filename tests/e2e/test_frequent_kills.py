"""Stages of a cluster with one spare are killed faster than they start again, and streams get on all the while."""

import pytest

from tests.soak.frequent_kills import PROMPTS, survive


@pytest.mark.quiet
@pytest.mark.timeout(180)
async def test_streams_get_on_while_a_stage_is_killed_every_two_seconds(tiny_model):
    tally = await survive(tiny_model, seconds=7.0, every_s=2.0, seed=1, kv_cache_memory="8M")
    tally.check()
    assert tally.num_exact >= len(PROMPTS)
    assert len(tally.kills_s) >= 2, "there was somebody to kill"
    assert tally.num_restarts >= len(tally.kills_s) - 1, "as soon as they are killed"


@pytest.mark.quiet
@pytest.mark.nightly
@pytest.mark.smollm2
@pytest.mark.timeout(400)
@pytest.mark.parametrize("victims", ["stage", "any"])
async def test_a_minute_of_kills_every_two_seconds(smollm2, victims):
    tally = await survive(smollm2, seconds=60.0, every_s=2.0, seed=1, victims=victims)
    tally.check()
    assert tally.num_exact >= len(PROMPTS)
