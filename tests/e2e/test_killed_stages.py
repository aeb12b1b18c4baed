"""Stages are killed with SIGKILL under 32 streams, and each stream ends as if nothing had been."""

import pytest

from tests.soak.cluster import Deployment
from tests.soak.kills import survive

# A killed stage takes seconds to start again, so twenty are for `python -m tests.soak.kills` and the nightly run.
NUM_KILLS = 9
NUM_STREAMS = 32
SEED = 1


@pytest.mark.timeout(400)
async def test_32_streams_survive_kills_of_either_stage_and_of_both(tiny_model):
    shard_flags = ("--dtype", "float32", "--kv-cache-memory", "8M")
    tally = await survive(
        # Small steps, so that a prefill takes several of them.
        Deployment(tiny_model, ("0:2", "2:4"), shard_flags, ("--max-batch-tokens", "64")),
        num_kills=NUM_KILLS,
        num_streams=NUM_STREAMS,
        seed=SEED,
        num_requests=45,
        prompt_words=(3, 55),
        max_tokens=(40, 150),
    )
    assert sum(tally.kills.values()) == NUM_KILLS
    for moment in ("decode", "prefill", "replay"):
        assert any(name.startswith(moment) for name in tally.kills), tally
    assert tally.num_streams > NUM_STREAMS
    assert 0 < tally.num_stopped < tally.num_streams
