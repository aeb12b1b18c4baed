"""What a pipeline did, in all, over its epochs and its shards' restarts. Pure: told of reports and results, it adds.

Every figure only rises, so whoever looks twice may take the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from stagecoach.rpc.framing import FrameCounter
from stagecoach.v1 import shard_pb2

# What one process can come to; sums of many of them still fit 64 bits.
MAX_SECONDS = 1e10
MAX_COUNT = 1 << 48


@dataclass(slots=True)
class StageTotals:
    """A stage's counters as its shard reports them (see LoadReport in the contract), since we first heard of it.

    What a shard did before that, for another router or for this one's former process, is left out, and what it does
    after a restart goes on from what it had done before: time and work of one pipeline belong together.
    """

    num_steps: int = 0
    num_tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    queue_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    num_frames: int = 0
    num_fast_frames: int = 0
    _shard_id: str = ""
    _latest: shard_pb2.LoadReport = field(default_factory=shard_pb2.LoadReport)

    def add(self, shard_id: str, report: shard_pb2.LoadReport) -> None:
        """A report of the process `shard_id`. A counter that fell since the last one adds nothing.

        Nor does a report that cannot be: times that are no times, or counters that would not fit the status.
        """
        times = (report.compute_s, report.wait_s, report.queue_s, report.decode_s, report.encode_s)
        counters = (report.num_steps, report.num_tokens, report.num_frames, report.num_fast_frames)
        if not all(0.0 <= seconds <= MAX_SECONDS for seconds in times) or max(counters) > MAX_COUNT:
            return
        if shard_id != self._shard_id:
            self._shard_id, self._latest = shard_id, report
            return
        before, self._latest = self._latest, report
        self.num_steps = _sum(self.num_steps, report.num_steps - before.num_steps)
        self.num_tokens = _sum(self.num_tokens, report.num_tokens - before.num_tokens)
        self.compute_s += max(0.0, report.compute_s - before.compute_s)
        self.wait_s += max(0.0, report.wait_s - before.wait_s)
        self.queue_s += max(0.0, report.queue_s - before.queue_s)
        self.decode_s += max(0.0, report.decode_s - before.decode_s)
        self.encode_s += max(0.0, report.encode_s - before.encode_s)
        self.num_frames = _sum(self.num_frames, report.num_frames - before.num_frames)
        self.num_fast_frames = _sum(self.num_fast_frames, report.num_fast_frames - before.num_fast_frames)


def _sum(total: int, added: int) -> int:
    """A total only rises, and stays what a status can say."""
    return min(total + max(0, added), (1 << 63) - 1)


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
