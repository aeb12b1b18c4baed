"""What a cluster did between two looks: differences, and the fractions that follow from them."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_client.activity import activity
from stagecoach_client.status import ClusterStatus, read_status


def cluster(compute_s: float, wait_s: float, active_s: float, **counters: Any) -> ClusterStatus:
    stage = pb.StageStatus(
        address="a:1",
        layers=model_pb2.LayerRange(start=2, end=5),
        compute_s=compute_s,
        wait_s=wait_s,
        num_steps=int(10 * compute_s),
        queue_s=active_s / 2,
    )
    pipeline = pb.PipelineStatus(stages=[stage])
    return read_status(pb.GetClusterStatusResponse(pipelines=[pipeline], active_s=active_s, **counters))


def test_a_stage_is_as_busy_as_it_was_in_between() -> None:
    done = activity(cluster(13, 91, 54), cluster(10, 90, 50))
    (stage,) = done.stages
    assert (stage.address, stage.layers, stage.num_steps, stage.queue_s) == ("a:1", "2:5", 30, 2.0)
    assert (stage.busy_fraction, stage.bubble_fraction) == (0.75, 0.25)
    assert done.active_s == 4.0


def test_without_a_former_look_it_is_since_the_start() -> None:
    (stage,) = activity(cluster(1, 3, 4)).stages
    assert (stage.busy_fraction, stage.bubble_fraction) == (0.25, 0.75)


def test_so_it_is_when_the_router_was_restarted_in_between() -> None:
    (stage,) = activity(cluster(1, 3, 2, uptime_s=5.0), cluster(50, 50, 80, uptime_s=100.0)).stages
    assert (stage.busy_fraction, stage.bubble_fraction) == (0.25, 0.5)


def test_a_router_that_restarted_early_in_a_long_interval_is_found_out_by_its_counts() -> None:
    before = cluster(50, 50, 3, uptime_s=5.0, completion_tokens=900)
    (stage,) = activity(cluster(1, 3, 4, uptime_s=60.0, completion_tokens=10), before).stages
    assert (stage.busy_fraction, stage.bubble_fraction) == (0.25, 0.75)


def two_pipelines(*stages: list[tuple[str, float, float]], active_s: float) -> ClusterStatus:
    """Pipelines of stages (address, compute_s, wait_s)."""
    pipelines = [
        pb.PipelineStatus(
            ready=True,
            stages=[
                pb.StageStatus(address=address, compute_s=compute_s, wait_s=wait_s)
                for address, compute_s, wait_s in each
            ],
        )
        for each in stages
    ]
    return read_status(pb.GetClusterStatusResponse(pipelines=pipelines, active_s=active_s))


def test_figures_go_by_address_whichever_pipeline_a_shard_is_in() -> None:
    before = two_pipelines([("a:1", 10, 10), ("a:2", 20, 20)], [("b:1", 5, 5)], active_s=10)
    after = two_pipelines([("a:1", 11, 13)], [("b:1", 5, 9), ("a:2", 23, 21)], active_s=14)
    stages = activity(after, before).stages
    assert [(stage.pipeline, stage.stage, stage.address) for stage in stages] == [
        (0, 0, "a:1"),
        (1, 0, "b:1"),
        (1, 1, "a:2"),
    ]
    assert [stage.busy_fraction for stage in stages] == [0.25, 0.0, 0.75]
    assert [stage.bubble_fraction for stage in stages] == [0.75, 1.0, 0.25]


def test_a_stage_that_a_lost_pipeline_still_names_is_counted_once() -> None:
    def stage(address: str) -> pb.StageStatus:
        return pb.StageStatus(address=address, compute_s=1, wait_s=1)

    lost = pb.PipelineStatus(stages=[stage("a:1"), stage("a:2")])
    serving = pb.PipelineStatus(ready=True, stages=[stage("b:1"), stage("a:2")])
    status = read_status(pb.GetClusterStatusResponse(pipelines=[lost, serving], active_s=2))
    stages = activity(status).stages
    assert [(stage.pipeline, stage.address) for stage in stages] == [(0, "a:1"), (1, "b:1"), (1, "a:2")]


def test_a_shard_that_came_since_has_all_it_did_and_one_that_was_forgotten_too() -> None:
    before = two_pipelines([("a:1", 50, 50)], active_s=10)
    after = two_pipelines([("a:1", 1, 3)], [("b:1", 3, 1)], active_s=14)
    assert [stage.busy_fraction for stage in activity(after, before).stages] == [0.25, 0.75]


def test_what_cannot_be_told_is_none() -> None:
    done = activity(cluster(1, 1, 2), cluster(1, 1, 2))
    assert (done.stages[0].busy_fraction, done.stages[0].bubble_fraction) == (None, None)
    assert (done.prefix_hit_fraction, done.result_bytes_per_token) == (None, None)


def test_computing_for_nobody_who_runs_is_no_negative_bubble() -> None:
    assert activity(cluster(3, 1, 2)).stages[0].bubble_fraction == 0.0


def test_ratios_of_the_router_are_of_the_interval() -> None:
    before = {
        "looked_up_prompt_tokens": 100,
        "cached_prompt_tokens": 100,
        "completion_tokens": 50,
        "result_bytes": 1000,
        "result_payload_bytes": 500,
        "num_repeats": 3,
        "num_preemptions": 2,
    }
    after = {
        "looked_up_prompt_tokens": 300,
        "cached_prompt_tokens": 150,
        "completion_tokens": 60,
        "result_bytes": 1400,
        "result_payload_bytes": 580,
        "num_repeats": 7,
        "num_preemptions": 2,
    }
    done = activity(cluster(1, 1, 2, **after), cluster(1, 1, 2, **before))
    assert done.prefix_hit_fraction == pytest.approx(0.25)
    assert (done.result_bytes_per_token, done.result_payload_bytes_per_token) == (40.0, 8.0)
    assert (done.num_repeats, done.num_preemptions) == (4, 0)
