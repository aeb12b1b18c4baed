"""A router that is killed comes back with its journal, and its streams go on without a gap or a repeat."""

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from stagecoach_client import Client
from tests.cluster import free_port
from tests.e2e.processes import running, shard_arguments

NUM_STREAMS = 8
NUM_TOKENS = 400
NUM_TOKENS_BEFORE = 10


def sampled(index):
    """Greedy, or drawn from few tokens: see test_drain_processes."""
    return {
        "token_ids": [index + 1, 2, 3, 4, 5],
        "seed": index,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "top_k": 3,
        "temperature": 1.0 if index % 2 else 0.0,
        "frequency_penalty": 0.2 if index % 4 == 3 else 0.0,
    }


@pytest.mark.parametrize(
    "killed_again_at", [(), pytest.param(("listening", "of them go on", "listening"), marks=pytest.mark.nightly)]
)
def test_eight_streams_survive_a_killed_router(tiny_model, tmp_path, killed_again_at):
    """Also one that is killed before its journal is read, or when requests have just begun to go on."""
    port = free_port()
    with ExitStack() as stack:
        addresses = []
        for layers in ("0:2", "2:4"):
            addresses.append(f"127.0.0.1:{free_port()}")
            arguments = shard_arguments(tiny_model, layers, addresses[-1].rpartition(":")[2])
            stack.enter_context(running("stagecoach-shard", *arguments))
        router_arguments = ["--shards", ",".join(addresses), "--listen", f"127.0.0.1:{port}"]
        router_arguments += ["--journal", str(tmp_path / "journal.sqlite")]
        router = stack.enter_context(running("stagecoach-router", *router_arguments))
        router.wait_for("ready")
        client = stack.enter_context(Client(f"127.0.0.1:{port}"))
        threads = stack.enter_context(ThreadPoolExecutor(NUM_STREAMS))
        undisturbed = list(threads.map(lambda index: client.generate(**sampled(index)), range(NUM_STREAMS)))

        streams = [client.generate(stream=True, **sampled(index)) for index in range(NUM_STREAMS)]
        seen = list(threads.map(lambda stream: _read(stream, NUM_TOKENS_BEFORE), streams))
        router.kill()
        assert all(len(token_ids) < NUM_TOKENS for token_ids in seen), "killed in the middle of all of them"
        answers = threads.map(lambda stream: stream.collect(), streams)
        for line in killed_again_at:
            with running("stagecoach-router", *router_arguments) as router:
                router.wait_for(line)
        again = stack.enter_context(running("stagecoach-router", *router_arguments))

        again.wait_for("8 of them go on")
        for before, after in zip(undisturbed, list(answers), strict=True):
            assert after.completions == before.completions
        status = client.status()
        assert killed_again_at or status.completion_tokens < NUM_STREAMS * (NUM_TOKENS - NUM_TOKENS_BEFORE) + 1, (
            "no stream began anew"
        )
        assert status.num_free_blocks == status.num_blocks
        assert again.stop(signal.SIGTERM) == 0


def _read(stream, num_tokens):
    token_ids = []
    while len(token_ids) < num_tokens:
        token_ids += next(stream).token_ids
    return token_ids
