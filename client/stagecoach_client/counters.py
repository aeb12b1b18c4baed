"""The load figures of a router and of a stage: counters that only rise, and how much they rose between two looks. Pure.

The names are those of the protocol's GetClusterStatusResponse and StageStatus. Times are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounters:
    """What a stage has done since the router first heard of it."""

    num_steps: int
    num_tokens: int
    compute_s: float  # its compute thread worked on a step
    wait_s: float  # its compute thread waited for one
    queue_s: float  # how long each step had waited for the compute thread, summed over the steps
    decode_s: float  # reading and checking frames
    encode_s: float  # writing frames
    num_frames: int  # frames that it read
    num_fast_frames: int  # those of them whose payload was read without a copy


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCounters:
    """What a router and its pipelines have done since the router started."""

    num_finished: int  # requests
    num_preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int  # prompt tokens whose K/V was found in the prefix cache
    looked_up_prompt_tokens: int  # prompt tokens that were looked for there
    completion_tokens: int
    num_repeats: int  # draws that fell outside of the candidates, each of which cost a whole row of logits
    active_s: float  # at least one sequence was running
    num_results: int  # results that the last stage sent back
    result_payload_bytes: int  # the logits and ids in them
    result_bytes: int  # the whole messages
    num_frames: int  # frames that the router read from its shards
    num_fast_frames: int  # those of them whose payload was read without a copy


Counters = TypeVar("Counters", StageCounters, RouterCounters)


def increase(kind: type[Counters], after: Counters, before: Counters | None) -> Counters:
    """How much each counter of `kind` rose from `before` to `after`; without a `before`, from 0."""
    values = {counter.name: getattr(after, counter.name) for counter in fields(kind)}
    if before is not None:
        values = {name: value - getattr(before, name) for name, value in values.items()}
    return kind(**values)


def busy_fraction(stage: StageCounters) -> float | None:
    """The share of wall time in which the stage's compute thread worked on a step; None when no time has passed."""
    total_s = stage.compute_s + stage.wait_s
    return stage.compute_s / total_s if total_s > 0 else None
