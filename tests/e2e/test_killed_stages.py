"""Stages are killed with SIGKILL under 32 streams, and each stream ends as if nothing had been."""

import pytest

from tests.soak.cluster import Deployment
from tests.soak.kills import survive

# A killed stage takes seconds to start again, where no spare loads its layers: `python -m tests.soak.kills` has all
# twenty kills without spares.
DEPLOYMENTS = {
    "without spares": (("0:2", "2:4"), 5),
    "with spares": (("0:2", "2:4", "auto", "auto"), 15),
}
NUM_STREAMS = 32
SEED = 1
SHARD_FLAGS = ("--dtype", "float32", "--kv-cache-memory", "8M")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("layers", "num_kills"), DEPLOYMENTS.values(), ids=DEPLOYMENTS.keys())
async def test_32_streams_survive_kills_of_any_stage_and_of_all(tiny_model, layers, num_kills):
    tally = await survive(
        # Small steps, so that a prefill takes several of them.
        Deployment(tiny_model, layers, SHARD_FLAGS, ("--max-batch-tokens", "64")),
        num_kills=num_kills,
        num_streams=NUM_STREAMS,
        seed=SEED,
        num_requests=45,
        prompt_words=(3, 55),
        max_tokens=(40, 150),
    )
    assert sum(tally.kills.values()) == num_kills
    assert len({name.split(" of ")[0] for name in tally.kills}) > 1, f"at more than one kind of moment: {tally}"
    assert tally.num_streams > NUM_STREAMS
    assert 0 < tally.num_stopped < tally.num_streams
