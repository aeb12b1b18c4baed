"""Which shards make a pipeline: the best chain there is, whatever ranges the shards have, and soon."""

import itertools
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import TopologyError
from stagecoach.topology import LayerRange, split_evenly
from stagecoach_router.pipelines.placement import Candidate, PlannedStage, find_chain


def fixed(address, layers, num_blocks=8):
    return Candidate(address, LayerRange.parse(layers), False, num_blocks)


def loaded(address, layers, num_blocks=8):
    return Candidate(address, LayerRange.parse(layers), True, num_blocks)


def empty(address):
    return Candidate(address, None, True, 0)


def chain(candidates, num_layers=30, **options):
    """The chain as text: one `address=layers` for each stage, with a + where it has to load."""
    links = find_chain(candidates, num_layers, **options)
    return " ".join(f"{link.address}={link.layers}{'+' * link.must_load}" for link in links)


def test_shards_in_any_order_make_the_one_chain_there_is():
    assert chain([fixed("b", "10:30"), fixed("a", "0:10")]) == "a=0:10 b=10:30"


def test_one_shard_with_all_layers_is_a_chain():
    assert chain([fixed("a", "0:30")]) == "a=0:30"


def test_nothing_is_loaded_where_a_chain_is_there():
    shards = [empty("a"), loaded("b", "0:15"), fixed("c", "15:20"), fixed("d", "20:30"), loaded("e", "0:10")]
    assert chain(shards) == "b=0:15 c=15:20 d=20:30"


def test_the_least_layers_are_loaded():
    shards = [fixed("a", "0:10"), fixed("b", "0:14"), fixed("c", "15:30"), fixed("d", "20:30"), empty("e")]
    assert chain(shards) == "b=0:14 e=14:15+ c=15:30"


def test_shards_of_before_are_preferred_to_fewer_stages():
    shards = [fixed("whole", "0:30", 99), fixed("a", "0:15", 50), fixed("b", "15:30"), fixed("c", "15:30", 99)]
    assert chain(shards) == "whole=0:30"
    assert chain(shards, prefer=["a", "b"]) == "a=0:15 b=15:30"
    assert chain(shards, prefer=["a"]) == "a=0:15 c=15:30"


def test_the_smallest_stage_is_as_large_as_can_be():
    shards = [fixed("a", "0:15", 3), fixed("b", "0:15", 5), fixed("c", "15:30", 4), fixed("d", "15:30", 9)]
    assert chain(shards) == "b=0:15 d=15:30"


def test_what_is_alike_is_taken_by_address_however_narrow_its_neighbour_is():
    shards = [fixed("a", "0:15", 5), fixed("b", "0:15", 10), fixed("c", "15:30", 3)]
    assert chain(shards) == "a=0:15 c=15:30"
    assert chain(shards[::-1]) == "a=0:15 c=15:30"


def test_a_gap_is_loaded_by_a_shard_without_layers_before_one_whose_layers_are_needless():
    shards = [fixed("a", "0:15"), loaded("b", "0:15"), empty("c")]
    assert chain(shards) == "a=0:15 c=15:30+"
    assert chain(shards[:2]) == "a=0:15 b=15:30+"


def test_a_shard_of_before_that_came_back_empty_is_taken_before_a_spare():
    shards = [fixed("a", "0:15"), empty("b"), empty("c")]
    assert chain(shards, prefer=["a", "c"]) == "a=0:15 c=15:30+"


def test_a_gap_is_cut_for_as_many_shards_as_the_pipeline_had():
    shards = [loaded("a", "0:10"), empty("b"), empty("c"), empty("d")]
    assert chain(shards, prefer=["a", "b", "c"]) == "a=0:10 b=10:20+ c=20:30+"
    assert chain(shards, num_stages=4) == "a=0:10 b=10:17+ c=17:24+ d=24:30+"
    assert chain(shards, num_stages=9) == "a=0:10 b=10:17+ c=17:24+ d=24:30+"


def test_nothing_is_loaded_where_that_is_not_wanted():
    shards = [fixed("a", "0:15"), empty("b"), empty("c")]
    with pytest.raises(TopologyError, match="no shard serves layers 15:30"):
        find_chain(shards, 30, may_load=False)
    assert chain([*shards, loaded("d", "15:30")], may_load=False) == "a=0:15 d=15:30"


def test_shards_without_layers_split_the_model_evenly():
    shards = [empty(name) for name in "abc"]
    assert chain(shards) == "a=0:10+ b=10:20+ c=20:30+"
    assert chain(shards, num_stages=2) == "a=0:15+ b=15:30+"


def test_where_a_shards_layers_do_not_help_the_others_split_the_model():
    shards = [fixed("a", "10:20"), empty("b"), empty("c")]
    assert chain(shards) == "b=0:10+ a=10:20 c=20:30+"
    assert chain(shards[:2]) == "b=0:30+"
    assert chain([loaded("a", "10:20"), loaded("b", "10:20")]) == "a=0:15+ b=15:30+"


def test_too_few_shards_for_the_stages_wanted_do_not_split_the_model():
    with pytest.raises(TopologyError, match="no shard serves layers 0:30"):
        find_chain([empty("a"), empty("b")], 30, num_stages=3)


def test_more_shards_than_layers_get_one_layer_each():
    assert chain([empty("a"), empty("b"), empty("c")], 2) == "a=0:1+ b=1:2+"


def test_a_shard_with_layers_past_the_model_is_of_no_use():
    assert chain([fixed("a", "0:31"), fixed("b", "0:30")]) == "b=0:30"


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([], "no shard serves layers 0:8"),
        (["0:3", "4:8"], "no shard serves layers 3:4"),
        (["0:3", "0:3", "4:6"], "no shard serves layers 3:4"),
        (["1:8"], "no shard serves layers 0:1"),
        (["0:7"], "no shard serves layers 7:8"),
        (["0:9"], "no shard serves layers 0:8"),
        (["0:5", "3:8"], "layers 3:5 are served by more than one shard, and none begins at layer 5"),
    ],
)
def test_the_error_names_the_layers(ranges, message):
    with pytest.raises(TopologyError, match=message) as caught:
        find_chain([fixed(str(index), layers) for index, layers in enumerate(ranges)], 8)
    assert caught.value.field == "shards"


# Every chain there is, the slow way ------------------------------------------------------------------------------


def every_chain(candidates, num_layers):
    """All ways to cover the layers by shards that serve theirs and gaps of one assignable shard each."""
    num_assignable = sum(shard.assignable for shard in candidates)
    serving = [shard for shard in candidates if shard.layers is not None and shard.layers.end <= num_layers]
    for size in range(1, len(serving) + 1):
        for served in itertools.permutations(serving, size):
            starts = [shard.layers.start for shard in served]
            ends = [shard.layers.end for shard in served]
            gaps = [start - end for end, start in zip([0, *ends], [*starts, num_layers], strict=True)]
            taken = sum(gap > 0 for gap in gaps) + sum(shard.assignable for shard in served)
            if min(gaps) >= 0 and (not any(gaps) or taken <= num_assignable):
                yield served, sum(gaps), sum(gap > 0 for gap in gaps)


def rank(served, num_loads, num_gaps, prefer):
    preferred = sum(shard.address in prefer for shard in served)
    return num_loads, -preferred, len(served) + num_gaps, -min(shard.num_blocks for shard in served)


NUM_LAYERS = 6


@st.composite
def candidates_of_a_small_model(draw):
    shards = []
    for index in range(draw(st.integers(0, 5))):
        assignable = draw(st.booleans())
        start = draw(st.integers(0, NUM_LAYERS - 1))
        layers = LayerRange(start, draw(st.integers(start + 1, NUM_LAYERS + 1)))
        if assignable and draw(st.booleans()):
            shards.append(Candidate(f"s{index}", None, True, 0))
        else:
            shards.append(Candidate(f"s{index}", layers, assignable, draw(st.integers(1, 4))))
    return draw(st.permutations(shards))


@given(
    shards=candidates_of_a_small_model(),
    prefer=st.lists(st.sampled_from([f"s{index}" for index in range(5)]), unique=True),
    num_stages=st.integers(0, 4),
    may_load=st.booleans(),
)
def test_the_best_of_all_chains_is_found_and_an_error_raised_only_where_there_is_none(
    shards, prefer, num_stages, may_load
):
    known = {shard.address: shard for shard in shards}
    assignable = [shard for shard in shards if shard.assignable and may_load]
    searched = shards if may_load else [replace(shard, assignable=False) for shard in shards]
    best = min((rank(*found, prefer) for found in every_chain(searched, NUM_LAYERS)), default=None)
    can_split = bool(assignable) and num_stages <= len(assignable)

    try:
        links = find_chain(shards, NUM_LAYERS, prefer=prefer, num_stages=num_stages, may_load=may_load)
    except TopologyError:
        assert best is None
        assert not can_split
        return

    assert [link.layers.start for link in links] == [0, *(link.layers.end for link in links[:-1])]
    assert links[-1].layers.end == NUM_LAYERS
    assert len({link.address for link in links}) == len(links)
    for link in links:
        assert link.must_load == (known[link.address].layers != link.layers)
        assert not link.must_load or (may_load and known[link.address].assignable)
    loaded_now = [known[link.address] for link in links if link.must_load]
    if any(shard.layers is not None for shard in loaded_now):  # those without layers are taken first
        unused = [shard for shard in assignable if shard.address not in {link.address for link in links}]
        assert all(shard.layers is not None for shard in unused)
    if best is None:
        assert can_split
        assert all(link.must_load for link in links)
        assert [link.layers for link in links] == split_evenly(NUM_LAYERS, len(links))
        return
    served = [known[link.address] for link in links if not link.must_load]
    num_loads = sum(len(link.layers) for link in links if link.must_load)
    starts, ends = [shard.layers.start for shard in served], [shard.layers.end for shard in served]
    num_gaps = sum(end < start for end, start in zip([0, *ends], [*starts, NUM_LAYERS], strict=True))
    assert rank(served, num_loads, num_gaps, prefer) == best
    assert len(links) <= max(len(served) + num_gaps, num_stages or len(prefer))


@given(shards=candidates_of_a_small_model(), data=st.data())
def test_the_order_in_which_shards_are_listed_does_not_matter(shards, data):
    def outcome(listed):
        try:
            return find_chain(listed, NUM_LAYERS)
        except TopologyError as error:
            return error.message

    assert outcome(shards) == outcome(data.draw(st.permutations(shards)))


def hostile_ranges():
    """Every range overlaps many others, so that the number of chains is beyond counting."""
    yield [loaded(f"{index:02}", f"{index}:{index + 1}") for index in range(0, 200, 3)][:64]
    yield [loaded(f"{index:02}", f"{index * 3 % 180}:{index * 3 % 180 + 1 + index % 20}") for index in range(64)]
    yield [fixed(f"{index:02}", f"{index // 2 * 6}:{index // 2 * 6 + 6}", index) for index in range(64)]
    yield [loaded(f"{index:02}", f"{index // 4 * 10 + index % 4}:{index // 4 * 10 + 10}", index) for index in range(64)]


@pytest.mark.parametrize("shards", list(hostile_ranges()))
def test_ranges_that_make_more_chains_than_could_be_tried_take_no_time(shards):
    began = time.process_time()
    try:
        links = find_chain(shards, 200)
    except TopologyError:
        links = []
    assert time.process_time() - began < 2.0  # all chains would take longer than the universe
    assert not links or links[-1].layers.end == 200


def test_an_address_is_in_one_link_only_where_every_shard_could_fill_every_gap():
    shards = [loaded(name, layers) for name, layers in zip("abcd", ("0:10", "0:10", "12:20", "12:20"), strict=True)]
    assert find_chain(shards, 30) == [
        PlannedStage("a", LayerRange(0, 10), False),
        PlannedStage("b", LayerRange(10, 12), True),
        PlannedStage("c", LayerRange(12, 20), False),
        PlannedStage("d", LayerRange(20, 30), True),
    ]
