"""Shards make a pipeline only if they cover every layer exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument, TopologyError
from stagecoach.topology import LayerRange, order_stages, split_evenly


@given(num_layers=st.integers(1, 200), data=st.data())
def test_an_even_split_covers_all_layers_and_differs_by_one_at_most(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    ranges = split_evenly(num_layers, num_stages)
    assert order_stages(ranges, num_layers) == list(range(num_stages))
    sizes = [len(layers) for layers in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(num_layers=st.integers(1, 200), head_layers=st.integers(0, 20), data=st.data())
def test_a_head_takes_layers_from_the_last_stage_and_never_all(num_layers, head_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    ranges = split_evenly(num_layers, num_stages, head_layers)
    assert order_stages(ranges, num_layers) == list(range(num_stages))
    *others, last = [len(layers) for layers in ranges]
    assert max(others, default=0) - min(others, default=0) <= 1
    if last > 1 and others:
        assert abs(last + head_layers - max(others)) <= 1


@given(num_layers=st.integers(2, 60), data=st.data())
def test_ranges_in_any_order_are_put_in_order(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    ranges = data.draw(st.permutations(split_evenly(num_layers, num_stages)))
    assert [ranges[index].start for index in order_stages(ranges, num_layers)] == sorted(r.start for r in ranges)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (["0:3", "4:8"], "no shard serves layers 3:4"),
        (["1:8"], "no shard serves layers 0:1"),
        (["0:7"], "no shard serves layers 7:8"),
        (["0:5", "3:8"], "layers 3:5 are served by more than one"),
        (["0:8", "0:8"], "layers 0:8 are served by more than one"),
        (["0:9"], "layers 8:9 are served, and the model has 8"),
    ],
)
def test_a_gap_or_an_overlap_names_the_layers(ranges, message):
    with pytest.raises(TopologyError, match=message):
        order_stages([LayerRange.parse(text) for text in ranges], 8)


@pytest.mark.parametrize("text", ["", "3", "3:3", "5:2", "-1:4", "a:b", "0:1:2", "0;3"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(InvalidArgument) as caught:
        LayerRange.parse(text)
    assert caught.value.field == "layers"


@pytest.mark.parametrize("num_stages", [0, 9])
def test_layers_cannot_be_split_over_no_or_too_many_stages(num_stages):
    with pytest.raises(InvalidArgument):
        split_evenly(8, num_stages)
