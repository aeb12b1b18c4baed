"""Stages are killed with SIGKILL under 32 streams, and each stream ends as if nothing had been."""

import pytest

from tests.soak.cluster import Deployment
from tests.soak.kills import survive

# A killed stage takes seconds to start again, where no spare loads its layers, so kills without spares are for the
# night; `python -m tests.soak.kills` has all twenty. Nine kills are each moment with each choice of stages once.
WITHOUT_SPARES = ("0:2", "2:4")
WITH_SPARES = (*WITHOUT_SPARES, "auto", "auto")
DEPLOYMENTS = [
    pytest.param(WITH_SPARES, 9, id="with spares"),
    pytest.param(WITHOUT_SPARES, 9, id="without spares", marks=pytest.mark.nightly),
    pytest.param(WITH_SPARES, 18, id="with spares, longer", marks=pytest.mark.nightly),
]
NUM_STREAMS = 32
SEED = 1
SHARD_FLAGS = ("--dtype", "float32", "--kv-cache-memory", "8M")


@pytest.mark.quiet
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("layers", "num_kills"), DEPLOYMENTS)
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
