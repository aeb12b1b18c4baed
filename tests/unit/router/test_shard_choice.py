"""Which shards a pipeline is opened over and which have to load for it: what holds whatever shards there are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import TopologyError, Unavailable
from stagecoach.topology import LayerRange
from stagecoach_router.pipelines.placement import Candidate
from stagecoach_router.pipelines.shard_choice import Wish, choose_shards

NUM_LAYERS = 4
MIN_BLOCKS = 2


@st.composite
def candidates(draw):
    shards = []
    for index in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, NUM_LAYERS - 1))
        layers = LayerRange(start, draw(st.integers(start + 1, NUM_LAYERS)))
        kind = draw(st.sampled_from(["serving", "serving", "empty", "loading"]))
        shards.append(
            Candidate(
                f"s{index}",
                None if kind == "empty" else layers,
                assignable=kind == "empty" or (kind == "serving" and draw(st.booleans())),
                num_blocks=draw(st.integers(0, 4)) if kind == "serving" else 0,
                is_quarantined=kind == "serving" and draw(st.booleans()),
                is_loading=kind == "loading",
            )
        )
    return shards


wishes = st.builds(
    Wish,
    num_layers=st.just(NUM_LAYERS),
    min_blocks=st.just(MIN_BLOCKS),
    former=st.lists(st.sampled_from([f"s{index}" for index in range(5)]), unique=True, max_size=3),
    num_stages=st.integers(0, 3),
    may_load=st.booleans(),
)


@given(shards=candidates(), wish=wishes)
def test_a_pipeline_is_whole_and_of_shards_that_serve_and_what_it_takes_is_left_alone(shards, wish):
    known = {shard.address: shard for shard in shards}
    choice = choose_shards(shards, wish)
    assert bool(choice.stages) == (choice.error is None), "one of both"
    if choice.stages:
        assert [stage.layers.start for stage in choice.stages] == [0, *(s.layers.end for s in choice.stages[:-1])]
        assert choice.stages[-1].layers.end == NUM_LAYERS
    for stage in choice.stages:
        assert not known[stage.address].is_loading
        assert known[stage.address].layers == stage.layers
    for stage in choice.loads:
        assert wish.may_load
        assert known[stage.address].assignable
        assert known[stage.address].layers != stage.layers
        assert stage.address not in choice.addresses
    if choice.loads and not choice.stages:
        assert isinstance(choice.error, Unavailable)
    if choice.is_second_choice:
        assert any(known[address].is_quarantined for address in choice.addresses)


@given(shards=candidates(), wish=wishes)
def test_shards_in_quarantine_and_without_room_are_taken_only_where_there_are_no_others(shards, wish):
    choice = choose_shards(shards, wish)
    good = [
        shard for shard in shards if not shard.is_quarantined and (shard.num_blocks >= MIN_BLOCKS or not shard.layers)
    ]
    best = choose_shards(good, wish)
    if best.stages:
        known = {shard.address: shard for shard in shards}
        assert not any(known[address].is_quarantined for address in choice.addresses)
        assert all(known[address].num_blocks >= MIN_BLOCKS for address in choice.addresses)
        assert not choice.loads
        assert not choice.is_second_choice


def test_without_any_shard_the_first_layers_are_missing():
    choice = choose_shards([], Wish(NUM_LAYERS, MIN_BLOCKS, may_load=True))
    assert isinstance(choice.error, TopologyError)
    assert "0:4" in str(choice.error)
