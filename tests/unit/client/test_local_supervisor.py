"""Whether a cluster whose supervisor gave up some of its processes can still serve."""

from __future__ import annotations

import sys
import threading

import pytest

from stagecoach.topology import LayerRange
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_client.status import read_status
from stagecoach_local.process import Process, can_serve
from stagecoach_local.supervisor import Supervisor

TIMEOUT_S = 20.0
FIRST, SECOND = LayerRange(0, 15), LayerRange(15, 30)


def processes(num_replicas: int, num_spares: int) -> list[Process]:
    """Pipelines of two stages; then the spares, then the router."""
    layers = [*[FIRST, SECOND] * num_replicas, *[None] * num_spares]
    shards = [Process("", "spare" if each is None else "shard", [], "", each) for each in layers]
    return [*shards, Process("", "router", [], "")]


@pytest.mark.parametrize(
    ("num_replicas", "num_spares", "given_up", "serves"),
    [
        (1, 0, (), True),
        (1, 0, (0,), False),
        (1, 0, (2,), False),
        (2, 0, (0,), True),
        (2, 0, (0, 3), True),
        (2, 0, (0, 2), False),
        (1, 1, (2,), True),
        (1, 1, (1,), True),
        (1, 1, (1, 2), False),
        (1, 1, (0, 1), False),
        (1, 2, (0, 1), True),
        (2, 2, (6,), False),
    ],
)
def test_it_takes_a_router_and_for_each_layer_range_a_shard_or_a_spare(
    num_replicas: int, num_spares: int, given_up: tuple[int, ...], serves: bool
) -> None:
    cluster = processes(num_replicas, num_spares)
    for index in given_up:
        cluster[index].given_up = True
    assert can_serve(cluster) == serves


def test_what_the_router_knows_of_the_process_before_it_does_not_count_for_the_one_that_was_started_again() -> None:
    class Child:
        pid = 7

    spare = Process("", "spare", [], "127.0.0.1:1")
    spare.child = Child()  # type: ignore[assignment]
    for pid, reason, does in ((6, "", False), (7, "loading layers 0:15", False), (7, "", True)):
        answer = pb.GetClusterStatusResponse(spares=[pb.SpareStatus(address=spare.address, pid=pid, reason=reason)])
        assert spare.does_its_job(read_status(answer)) == does


def test_nobody_looks_at_a_router_that_is_about_to_be_stopped() -> None:
    """gRPC would write of a connection that ends to standard error, which is that of `up`."""
    looks: list[str] = []
    supervisor = Supervisor([], lambda: looks.append("a look"))
    supervisor.start()
    supervisor.stop()
    assert not [thread for thread in threading.enumerate() if "supervisor" in thread.name]
    assert looks == []


def test_a_router_that_does_not_answer_delays_no_restart() -> None:
    looks, asked, restarted = threading.Event(), threading.Event(), threading.Event()

    def look() -> None:
        asked.set()
        looks.wait(TIMEOUT_S)  # as of a router that is stopped

    def shard(name: str) -> Process:
        return Process(name, "shard", [sys.executable, "-c", "import time; time.sleep(100)"], "", FIRST)

    first, second = shard("first"), shard("second")
    for process in (first, second):
        process.child.start()
    supervisor = Supervisor([first, second], look, lambda text: restarted.set() if "second" in text else None)
    supervisor.start()
    try:
        first.child.kill()
        assert asked.wait(TIMEOUT_S), "whether the first one has come up again"
        second.child.kill()
        assert restarted.wait(TIMEOUT_S / 2)
        assert not first.came_up
    finally:
        supervisor.stop()
        looks.set()
        for process in (first, second):
            process.child.kill()
    assert supervisor.failure is None
