"""What the router did in all, and its pipelines, over their epochs and their shards' restarts.

Every figure only rises, so whoever looks twice may take the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from stagecoach.rpc.framing import FrameCounter
from stagecoach_router.metrics.load_report import StageCounters


@dataclass(slots=True)
class Counters:
    """What the router did since it started."""

    num_finished: int = 0
    prompt_tokens: int = 0
    looked_up_prompt_tokens: int = 0  # in the prefix cache, where cached_prompt_tokens of them were
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    num_repeats: int = 0  # rows computed once more because their candidates did not determine the token


class StageTotals:
    """A stage's counters since the router first heard of it.

    What a shard did before that, for another router or for this one's former process, is left out, and what it does
    after a restart goes on from what it had done before: time and work of one pipeline belong together.
    """

    def __init__(self) -> None:
        self.counters = StageCounters()
        self._shard_id = ""
        self._latest = StageCounters()

    def add(self, shard_id: str, reported: StageCounters) -> None:
        """Takes what the process `shard_id` has counted. What cannot be is left out."""
        if not reported.is_possible:
            return
        if shard_id == self._shard_id:
            self.counters = self.counters.plus_rise(self._latest, reported)
        self._shard_id, self._latest = shard_id, reported


class PipelineTotals:
    """The stages' totals, and what came back from the last one."""

    def __init__(self) -> None:
        self.frames = FrameCounter()  # that the router read from all its sessions
        self.num_results = 0
        self.result_payload_bytes = 0
        self.result_bytes = 0  # the whole messages
        self._stages: dict[str, StageTotals] = {}

    def stage(self, address: str) -> StageTotals:
        """The totals of the stage at `address`."""
        return self._stages.setdefault(address, StageTotals())

    def add_result(self, payload_bytes: int, message_bytes: int) -> None:
        """A step's result came."""
        self.num_results += 1
        self.result_payload_bytes += payload_bytes
        self.result_bytes += message_bytes


class ActiveTime:
    """The time in which at least one sequence ran, in seconds. To be told whenever that may have changed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended_s = 0.0
        self._since: float | None = None

    def set(self, active: bool) -> None:
        """Whether one runs from now on. Saying the same again changes nothing, and costs next to nothing."""
        if active == (self._since is not None):
            return
        now = self._clock()
        if self._since is not None:
            self._ended_s += now - self._since
        self._since = now if active else None

    @property
    def total_s(self) -> float:
        """So far."""
        return self._ended_s + (0.0 if self._since is None else self._clock() - self._since)
