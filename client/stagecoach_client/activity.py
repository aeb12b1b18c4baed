"""What a cluster did between two looks at it: the differences of its counters, and what they come to. Pure.

Of a stage, over an interval:

- busy: compute / (compute + wait). Its compute thread is always in one of the two, so this is the part of wall time in
  which it worked on a step, whatever the step was for.
- bubble: 1 - compute / active, where active is the time in which the router had at least one sequence running: the part
  of that time in which the stage had nothing to compute. Work that was another router's, or for a sequence that was
  cancelled before its step was computed, makes it too small; it ends at 0. Of several pipelines, active is when any of
  them had one, so a pipeline without requests beside one that has them is all bubble.

Figures go by a shard's address, whichever pipeline it was in. Of one that came only after the first look they are
since the router first heard of it, and what one did that is in no pipeline any more is not among them. A pipeline that
is lost still names its stages; one of them that serves in another pipeline by now is counted there, and once.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach_client.status import ClusterStatus, StageStatus, busy_fraction


@dataclass(frozen=True, slots=True)
class StageActivity:
    """What one stage did; see the module. Times in seconds; a fraction that cannot be told is None."""

    pipeline: int  # as the router lists them, from 0
    stage: int  # in that pipeline, from 0
    address: str
    layers: str
    busy_fraction: float | None
    bubble_fraction: float | None
    num_steps: int
    num_tokens: int
    compute_s: float
    wait_s: float
    queue_s: float  # summed over the steps: how long each had arrived before it was begun
    decode_s: float  # reading frames
    encode_s: float  # writing frames
    num_frames: int
    num_fast_frames: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What a router and its stages did; a ratio that cannot be told is None."""

    active_s: float
    prefix_hit_fraction: float | None  # of the prompt tokens that were looked for in the prefix cache
    num_preemptions: int
    num_repeats: int  # draws that fell outside of the candidates
    result_payload_bytes_per_token: float | None  # that came back from the last stage, per generated token
    result_bytes_per_token: float | None  # the same of the whole messages
    num_frames: int  # that the router read from its shards
    num_fast_frames: int
    stages: tuple[StageActivity, ...]  # those of all pipelines, each shard once


def activity(after: ClusterStatus, before: ClusterStatus | None = None) -> Activity:
    """What was done since `before`; since the router started, where that is None or of a router that ended since."""
    if before is not None and _is_of_another_life(before, after):
        before = None

    def since(name: str) -> int:
        return int(getattr(after, name) - (0 if before is None else getattr(before, name)))

    active_s = after.active_s - (0.0 if before is None else before.active_s)
    num_tokens = since("completion_tokens")
    earlier = {} if before is None else {stage.address: stage for stage in _stages(before)}
    return Activity(
        active_s=active_s,
        prefix_hit_fraction=_ratio(since("cached_prompt_tokens"), since("looked_up_prompt_tokens")),
        num_preemptions=since("num_preemptions"),
        num_repeats=since("num_repeats"),
        result_payload_bytes_per_token=_ratio(since("result_payload_bytes"), num_tokens),
        result_bytes_per_token=_ratio(since("result_bytes"), num_tokens),
        num_frames=since("num_frames"),
        num_fast_frames=since("num_fast_frames"),
        stages=tuple(
            _stage_activity(pipeline_index, stage_index, stage, earlier.get(stage.address), active_s)
            for pipeline_index, pipeline in enumerate(after.pipelines)
            for stage_index, stage in enumerate(pipeline.stages)
            if pipeline.ready or after.serving_pipeline(stage.address) is None
        ),
    )


def _is_of_another_life(before: ClusterStatus, after: ClusterStatus) -> bool:
    """Whether the router has begun to count anew. One that did early in a long interval may be up for longer again."""
    if before.uptime_s > after.uptime_s:
        return True
    names = ("active_s", "num_finished", "prompt_tokens", "completion_tokens", "num_results", "num_frames")
    return any(getattr(after, name) < getattr(before, name) for name in names)


def _stages(status: ClusterStatus) -> list[StageStatus]:
    return [stage for pipeline in status.pipelines for stage in pipeline.stages]


def _stage_activity(
    pipeline: int, stage: int, after: StageStatus, before: StageStatus | None, active_s: float
) -> StageActivity:
    if before is not None and after.compute_s + after.wait_s < before.compute_s + before.wait_s:
        before = None  # the router has forgotten it, and heard of it anew

    def since(name: str) -> float:
        return float(getattr(after, name) - (0 if before is None else getattr(before, name)))

    compute_s, wait_s = since("compute_s"), since("wait_s")
    idle = _ratio(active_s - compute_s, active_s)
    return StageActivity(
        pipeline=pipeline,
        stage=stage,
        address=after.address,
        layers=f"{after.first_layer}:{after.end_layer}",
        busy_fraction=busy_fraction(compute_s, wait_s),
        bubble_fraction=None if idle is None else max(0.0, idle),
        num_steps=int(since("num_steps")),
        num_tokens=int(since("num_tokens")),
        compute_s=compute_s,
        wait_s=wait_s,
        queue_s=since("queue_s"),
        decode_s=since("decode_s"),
        encode_s=since("encode_s"),
        num_frames=int(since("num_frames")),
        num_fast_frames=int(since("num_fast_frames")),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
