"""SIGTERM ends a process when its work is done, and a second one at once."""

import os
import signal
import time
from contextlib import ExitStack, contextmanager

import pytest

from stagecoach_client import Client, Unavailable
from tests.cluster import free_port
from tests.e2e.processes import TIMEOUT_S, running
from tests.e2e.test_start_and_stop import shard_arguments

# Few tokens to draw from: a batch of another shape rounds otherwise, and each border between two tokens is where one
# random number in some hundred thousand then falls on the other side.
ANSWER = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "seed": 3, "n": 4, "top_k": 3}


@contextmanager
def one_shard_cluster(model):
    """(shard, router, client)."""
    shard_port, router_port = free_port(), free_port()
    with ExitStack() as stack:
        shard = stack.enter_context(running("stagecoach-shard", *shard_arguments(model, "0:4", shard_port)))
        arguments = ["--shards", f"127.0.0.1:{shard_port}", "--listen", f"127.0.0.1:{router_port}"]
        router = stack.enter_context(running("stagecoach-router", *arguments))
        router.wait_for("ready")
        yield shard, router, stack.enter_context(Client(f"127.0.0.1:{router_port}", max_retries=0))


def test_a_stream_ends_as_if_nothing_were_while_its_router_and_its_shard_stop(tiny_model):
    with one_shard_cluster(tiny_model) as (shard, router, client):
        undisturbed = client.generate(**ANSWER)
        stream = client.generate(stream=True, **ANSWER)
        next(stream)
        os.kill(shard.pid, signal.SIGTERM)
        shard.wait_for("draining: 1 leases")
        os.kill(router.pid, signal.SIGTERM)
        router.wait_for("draining: 1 requests")
        assert stream.collect().completions == undisturbed.completions
        assert router.wait() == 0
        assert shard.wait() == 0
    assert not [line for line in router.lines + shard.lines if "Traceback" in line]


def test_a_second_signal_stops_at_once(tiny_model):
    with one_shard_cluster(tiny_model) as (shard, router, client):
        deadline = time.monotonic() + TIMEOUT_S
        while not client.status().pipelines[0].ready:  # until a token has come through it, requests wait
            assert time.monotonic() < deadline
        os.kill(shard.pid, signal.SIGSTOP)  # so that nothing can end
        stream = client.generate(stream=True, **ANSWER)
        while client.status().num_running == 0:
            assert time.monotonic() < deadline
        os.kill(router.pid, signal.SIGTERM)
        router.wait_for("draining: 1 requests")
        os.kill(router.pid, signal.SIGTERM)
        with pytest.raises(Unavailable):
            stream.collect()
        assert router.wait() == 0
        os.kill(shard.pid, signal.SIGCONT)
    assert not [line for line in router.lines if "Traceback" in line]
