"""What a stage says it has done: one type for its counters, all the way from the shard's report to the status."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from stagecoach.v1 import shard_pb2

# What one process can come to; sums of many of them still fit 64 bits.
MAX_SECONDS = 1e10
MAX_COUNT = 1 << 48
MAX_TOTAL = (1 << 63) - 1


class StageCounters(NamedTuple):
    """Counters that only rise. The contract explains them at LoadReport, and a StageStatus has the same ones."""

    num_steps: int = 0
    num_tokens: int = 0
    num_frames: int = 0
    num_fast_frames: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    queue_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0

    @property
    def is_possible(self) -> bool:
        """Whether a process can have counted this: times are times, and no counter is absurd."""
        return all(0 <= value <= (MAX_SECONDS if isinstance(value, float) else MAX_COUNT) for value in self)

    def plus_rise(self, before: StageCounters, now: StageCounters) -> StageCounters:
        """These, and by how much each counter rose from `before` to `now`. One that fell adds nothing."""
        sums = (total + max(0, new - old) for total, old, new in zip(self, before, now, strict=True))
        return StageCounters._make(min(total, MAX_TOTAL) for total in sums)


NOTHING_YET = StageCounters()


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A shard's LoadReport: its counters, for everybody, and what it did for our lease since that was opened."""

    counters: StageCounters = NOTHING_YET
    number: int = 0  # of the question that it answers, and all before it; 0 where it came unasked
    queue_depth: int = 0  # micro-batches that had arrived and not begun
    lease_num_steps: int = 0
    lease_compute_s: float = 0.0
    lease_queue_depth: int = 0


def read_load_report(message: shard_pb2.LoadReport) -> LoadReport:
    """The message as a value."""
    return LoadReport(
        counters=StageCounters._make(getattr(message, name) for name in StageCounters._fields),
        number=message.number,
        queue_depth=message.queue_depth,
        lease_num_steps=message.lease_num_steps,
        lease_compute_s=message.lease_compute_s,
        lease_queue_depth=message.lease_queue_depth,
    )
