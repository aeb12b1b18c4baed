"""What a cluster did between two looks at it: how much its counters rose, and what follows from that. Pure.

Two fractions describe a stage over an interval:

- busy = compute / (compute + wait). Its compute thread is always in one of the two, so this is the part of wall time in
  which it worked on a step, whoever the step was for.
- bubble = 1 - compute / active, where active is the time in which the router had at least one sequence running. So it
  is the part of that time in which the stage had nothing to compute. Work for another router, or for a sequence that
  was cancelled before its step was computed, makes it too small; it is never below 0. With several pipelines, active
  is the time in which any of them had a sequence, so a pipeline without requests beside a busy one is all bubble.

A shard is known by its address, whichever pipeline it is in. If it came after the first look, its figures count from
when the router first heard of it. A shard that is in no pipeline at the second look is left out. A pipeline that was
lost still names its stages; a stage that serves in another pipeline by now is counted there, and only there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from stagecoach_client.counters import RouterCounters, StageCounters, busy_fraction, increase
from stagecoach_client.status import ClusterStatus, StageStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class StageActivity(StageCounters):
    """What one stage did in the interval. The module defines the fractions; None: there was no time to measure."""

    pipeline: int  # its place among the router's pipelines, from 0
    stage: int  # its place in that pipeline, from 0
    address: str
    layers: str
    busy_fraction: float | None
    bubble_fraction: float | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What a router and its stages did in the interval. A ratio to nothing is None."""

    active_s: float
    prefix_hit_fraction: float | None  # of the prompt tokens that were looked for in the prefix cache, those found
    num_preemptions: int
    num_repeats: int  # draws that fell outside of the candidates
    result_payload_bytes_per_token: float | None  # logits and ids from the last stage, per generated token
    result_bytes_per_token: float | None  # whole messages from the last stage, per generated token
    num_frames: int  # frames that the router read from its shards
    num_fast_frames: int  # those of them whose payload was read without a copy
    stages: tuple[StageActivity, ...]  # those of all pipelines, each shard once


def activity(after: ClusterStatus, before: ClusterStatus | None = None) -> Activity:
    """What was done since `before`.

    Without a `before`, or where the router was restarted in between, it is what was done since the router started.
    """
    if before is not None and _was_restarted(before, after):
        before = None
    done = increase(RouterCounters, after, before)
    earlier = {} if before is None else {stage.address: stage for each in before.pipelines for stage in each.stages}
    return Activity(
        active_s=done.active_s,
        prefix_hit_fraction=_ratio(done.cached_prompt_tokens, done.looked_up_prompt_tokens),
        num_preemptions=done.num_preemptions,
        num_repeats=done.num_repeats,
        result_payload_bytes_per_token=_ratio(done.result_payload_bytes, done.completion_tokens),
        result_bytes_per_token=_ratio(done.result_bytes, done.completion_tokens),
        num_frames=done.num_frames,
        num_fast_frames=done.num_fast_frames,
        stages=tuple(
            _stage_activity(pipeline_index, stage_index, stage, earlier.get(stage.address), done.active_s)
            for pipeline_index, pipeline in enumerate(after.pipelines)
            for stage_index, stage in enumerate(pipeline.stages)
            if pipeline.ready or after.serving_pipeline(stage.address) is None
        ),
    )


def _was_restarted(before: ClusterStatus, after: ClusterStatus) -> bool:
    """A router that restarted early in a long interval may be up for longer than before; then its counters tell."""
    if before.uptime_s > after.uptime_s:
        return True
    return any(getattr(after, each.name) < getattr(before, each.name) for each in fields(RouterCounters))


def _stage_activity(
    pipeline: int, stage: int, after: StageStatus, before: StageStatus | None, active_s: float
) -> StageActivity:
    if before is not None and after.compute_s + after.wait_s < before.compute_s + before.wait_s:
        before = None  # the router had forgotten it, and heard of it anew
    done = increase(StageCounters, after, before)
    idle_fraction = _ratio(active_s - done.compute_s, active_s)
    return StageActivity(
        **asdict(done),
        pipeline=pipeline,
        stage=stage,
        address=after.address,
        layers=f"{after.first_layer}:{after.end_layer}",
        busy_fraction=busy_fraction(done),
        bubble_fraction=None if idle_fraction is None else max(0.0, idle_fraction),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
