"""What shards without layers load before any stage is lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stagecoach.topology import LayerRange
from stagecoach_router.pipelines.placement import Candidate
from stagecoach_router.pipelines.standby import plan_standbys

FIRST, SECOND = LayerRange(0, 17), LayerRange(17, 30)
PIPELINE = (FIRST, SECOND)


def empty(name: str, *, assignable: bool = True, is_quarantined: bool = False) -> Candidate:
    return Candidate(name, None, assignable, 0, is_quarantined)


def holding(name: str, layers: LayerRange, *, is_loading: bool = False, is_quarantined: bool = False) -> Candidate:
    return Candidate(name, layers, True, 100, is_quarantined, is_loading)


def loads(candidates: list[Candidate], in_use: tuple[LayerRange, ...] = PIPELINE) -> list[tuple[str, LayerRange]]:
    plan = plan_standbys(candidates, in_use)
    assert all(stage.must_load for stage in plan)
    return [(stage.address, stage.layers) for stage in plan]


def test_one_spare_stands_by_for_the_stage_that_takes_the_longest_to_load():
    assert loads([empty("a")]) == [("a", FIRST)]
    assert loads([empty("a")], (LayerRange(0, 13), LayerRange(13, 30))) == [("a", LayerRange(13, 30))]


def test_each_further_one_stands_by_for_what_has_the_fewest():
    assert loads([empty("c"), empty("a"), empty("b")]) == [("a", FIRST), ("b", SECOND), ("c", FIRST)]
    assert loads([holding("a", FIRST), empty("b")]) == [("b", SECOND)]
    assert loads([holding("a", FIRST, is_loading=True), empty("b")]) == [("b", SECOND)]
    assert loads([holding("a", FIRST, is_quarantined=True), empty("b")]) == [("b", FIRST)], "hardly to be counted on"


def test_a_range_that_serves_in_several_pipelines_wants_several():
    assert loads([holding("a", FIRST), holding("b", SECOND), empty("c")], (FIRST, FIRST, SECOND)) == [("c", FIRST)]


def test_what_has_layers_keeps_them():
    """Another router may have given them, and would give them again."""
    assert loads([holding("a", LayerRange(0, 15)), holding("b", FIRST), holding("c", FIRST)]) == []


def test_who_may_not_load_or_is_in_quarantine_is_left_alone():
    assert loads([empty("a", assignable=False), empty("b", is_quarantined=True)]) == []


def test_without_a_pipeline_there_is_nothing_to_stand_by_for():
    assert loads([empty("a")], ()) == []


@given(
    num_empty=st.integers(0, 6),
    held=st.lists(st.sampled_from([*PIPELINE, LayerRange(0, 15)]), max_size=5),
    num_pipelines=st.integers(1, 3),
)
def test_only_ranges_in_use_are_loaded_and_evenly(num_empty, held, num_pipelines):
    spares = [empty(f"e{index}") for index in range(num_empty)]
    others = [holding(f"h{index}", layers) for index, layers in enumerate(held)]
    plan = loads([*spares, *others], PIPELINE * num_pipelines)
    assert [address for address, _ in plan] == [spare.address for spare in spares]
    before = Counter(layers for layers in held if layers in PIPELINE)
    after = before + Counter(layers for _, layers in plan)
    gap_before, gap = (abs(count[FIRST] - count[SECOND]) for count in (before, after))
    assert gap <= max(1, gap_before - num_empty)
