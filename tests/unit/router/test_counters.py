"""Counters that only rise, whatever becomes of the shards behind them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from stagecoach.v1 import inference_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.metrics.counters import ActiveTime, StageTotals
from stagecoach_router.metrics.load_report import StageCounters, read_load_report

COUNTERS = StageCounters._fields


def report(value: int) -> StageCounters:
    message = pb.LoadReport(**{name: value * (index + 1) for index, name in enumerate(COUNTERS)})
    return read_load_report(message).counters


def values(totals: StageTotals) -> list[float]:
    return list(totals.counters)


def test_what_a_shard_did_before_it_was_heard_of_is_left_out() -> None:
    totals = StageTotals()
    totals.add("one", report(100))
    assert values(totals) == [0] * len(COUNTERS)
    totals.add("one", report(103))
    assert values(totals) == [3 * (index + 1) for index in range(len(COUNTERS))]


def test_a_restarted_shard_goes_on_from_the_former_ones_counts() -> None:
    totals = StageTotals()
    for shard_id, value in (("one", 0), ("one", 5), ("two", 0), ("two", 2)):
        totals.add(shard_id, report(value))
    assert totals.counters.num_steps == 7


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50)), max_size=20))
def test_counters_never_fall(reports: list[tuple[str, int]]) -> None:
    totals = StageTotals()
    before = values(totals)
    for shard_id, value in reports:
        totals.add(shard_id, report(value))
        assert all(now >= then for now, then in zip(values(totals), before, strict=True))
        before = values(totals)


def test_active_time_is_that_between_the_first_to_run_and_the_last() -> None:
    now = 10.0
    active = ActiveTime(lambda: now)
    assert active.total_s == 0.0
    active.set(True)
    now = 12.0
    active.set(True)  # one more: nothing changes
    now = 13.0
    assert active.total_s == 3.0
    active.set(False)
    now = 20.0
    active.set(False)
    assert active.total_s == 3.0
    active.set(True)
    now = 21.0
    assert active.total_s == 4.0


@given(
    st.lists(
        st.builds(
            pb.LoadReport,
            num_steps=st.sampled_from([0, 7, 1 << 40, 2**64 - 1]),
            compute_s=st.sampled_from([0.0, 3.0, -1.0, 1e300, float("inf"), float("nan")]),
        ),
        max_size=12,
    )
)
def test_whatever_a_shard_says_the_status_can_be_written(reports: list[pb.LoadReport]) -> None:
    totals = StageTotals()
    for message in reports:
        totals.add("one", read_load_report(message).counters)
    status = inference_pb2.StageStatus(**totals.counters._asdict())
    assert math.isfinite(status.compute_s)


def test_a_report_that_cannot_be_changes_nothing() -> None:
    totals = StageTotals()
    for value in (0, 3):
        totals.add("one", report(value))
    totals.add("one", StageCounters(num_steps=2**64 - 1, compute_s=5.0))
    totals.add("one", StageCounters(num_steps=9, compute_s=float("inf")))
    totals.add("one", report(4))
    assert totals.counters.num_steps == 4
