"""A shard that lies, as a process beside two honest ones: what it costs the router's process, and its log."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from stagecoach_client import Client
from tests.cluster import free_port
from tests.e2e.processes import Process, running, shard_arguments
from tests.fuzz.lying_shard import LIES

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(sys.platform != "linux", reason="what a process has used is looked up in /proc"),
]

MAX_ADDED_MIB = 450  # the largest message that a shard may send, and what is made of it on the way
MAX_LOG_BYTES = 100_000
NUM_REQUESTS = 30


@pytest.fixture(scope="module")
def honest(tiny_model):
    """The addresses of two shards that make a pipeline."""
    ports = [free_port(), free_port()]
    with (
        running("stagecoach-shard", *shard_arguments(tiny_model, "0:2", ports[0])) as first,
        running("stagecoach-shard", *shard_arguments(tiny_model, "2:4", ports[1])) as second,
    ):
        first.wait_for("ready")
        second.wait_for("ready")
        yield [f"127.0.0.1:{port}" for port in ports]


@contextmanager
def lying(beside: str, lie: str):
    address = f"127.0.0.1:{free_port()}"
    arguments = ["--beside", beside, "--listen", address, "--lie", lie]
    process = Process([sys.executable, "-m", "tests.fuzz.lying_shard", *arguments])
    try:
        process.wait_for("lying at")
        yield address
    finally:
        process.kill()


def used_mib(pid: int) -> float:
    """The most memory that the process has had."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


@pytest.fixture(scope="module")
def usual_mib(honest):
    """What a router takes without the liar."""
    with serving(honest) as (router, client):
        answer(client)
        return used_mib(router.pid)


@contextmanager
def serving(addresses):
    target = f"127.0.0.1:{free_port()}"
    arguments = ["--shards", ",".join(addresses), "--listen", target, "--fault-timeout-s", "1"]
    with running("stagecoach-router", *arguments) as router:
        router.wait_for("sequences of up to")
        with Client(target) as client:
            yield router, client


def answer(client):
    for _ in range(NUM_REQUESTS):
        assert client.generate("Hello", max_tokens=5, ignore_eos=True).usage.completion_tokens == 5


@pytest.mark.parametrize("lie", LIES)
def test_a_router_beside_a_liar_serves_in_bounds(honest, usual_mib, lie):
    with lying(honest[0], lie) as liar, serving([liar, *honest]) as (router, client):
        answer(client)
        status = client.status()
        assert all(len(spare.reason) < 2000 and spare.reason.isprintable() for spare in status.spares)
        assert used_mib(router.pid) < usual_mib + MAX_ADDED_MIB
        assert router.stop() == 0
    log = "".join(router.lines)
    assert len(log) < MAX_LOG_BYTES
    assert log.replace("\n", "").isprintable()
    assert not [line for line in router.lines if line.startswith("12:00:00")]
    assert "Traceback" not in log
