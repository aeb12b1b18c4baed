"""Whether a cluster whose supervisor gave up some of its processes can still serve."""

from __future__ import annotations

import pytest

from stagecoach.topology import LayerRange
from stagecoach_local.process import Process, can_serve

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
