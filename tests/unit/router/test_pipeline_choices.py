"""Which shards the pipeline manager takes, which it has load layers, and whom it rather leaves out. No network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stagecoach.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    KVCacheFull,
    OutOfRange,
    Overloaded,
    ShardFault,
    StaleEpoch,
    TopologyError,
    Unavailable,
)
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.pipelines import pipeline_manager, shard_client
from stagecoach_router.pipelines.pipeline import PipelineContext
from stagecoach_router.pipelines.pipeline_manager import PipelineManager, PipelineSettings, _TakenShards
from stagecoach_router.pipelines.shard import Shard
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.shard_registry import ShardRegistry

NUM_LAYERS = 4
A, B, C, D = "a:1", "b:1", "c:1", "d:1"


def describe(registry, address, layers, *, num_free_blocks=100, process_id="", assignable=None):
    """The shard has answered: `layers` is "START:END", or "auto"."""
    start, end = (0, 0) if layers == "auto" else map(int, layers.split(":"))
    description = ShardDescription(
        address,
        shard_pb2.DescribeResponse(
            process_id=process_id or address,
            shard_id=f"{process_id or address} with {layers}",
            model=model_pb2.ModelDescription(fingerprint="f", num_layers=NUM_LAYERS),
            layers=model_pb2.LayerRange(start=start, end=end),
            assignable=layers == "auto" or address == D if assignable is None else assignable,
            num_free_blocks=num_free_blocks,
        ),
    )
    registry.learn(description)


def make_manager(settings=None, **layers):
    """A manager of shards that have answered, its registry, and what it has had them load."""
    return make_manager_of({f"{name}:1": held for name, held in layers.items()}, settings)


def make_manager_of(layers, settings=None):
    registry = ShardRegistry(list(layers), lease_id=1, timeout_s=1.0)
    for address, held in layers.items():
        describe(registry, address, held)
    loads = []
    registry.load = lambda address, layers: loads.append((address, str(layers)))
    return PipelineManager(registry, settings or PipelineSettings(), PipelineContext(lease_id=1)), registry, loads


def choice(manager, former=(), *, may_load=True):
    return manager._choose(list(former), may_load=may_load)


def chosen(manager, former=(), *, may_load=True):
    return choice(manager, former, may_load=may_load).addresses


def lose(registry, addresses, error):
    listener = SimpleNamespace(pipeline_lost=lambda error: None)
    _TakenShards(registry, list(addresses), epoch=9, listener=listener).pipeline_lost(error)


def test_a_shard_is_given_up_only_by_the_pipeline_that_it_is_in():
    _, registry, _ = make_manager(a="0:2", b="2:4")
    registry.take([A, B], epoch=1)
    registry.release([A, B], epoch=1)
    describe(registry, A, "0:2")
    registry.take([A], epoch=2)
    registry.release([A, B], epoch=1)  # as when an open fails after its pipeline was lost
    assert registry.shards[A].epoch == 2
    assert [shard.address for shard in registry.free] == [B]


@pytest.mark.parametrize(
    "kind",
    [Unavailable, ShardFault, InternalError, Cancelled, StaleEpoch, DeadlineExceeded, OutOfRange, Overloaded],
)
def test_the_stage_that_a_loss_names_is_second_choice(kind):
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="2:4")
    assert chosen(manager) == [A, B]
    lose(registry, [A, B], kind("no answer for 4.0 s", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(manager, [A, B]) == [A, C]
    registry.take([C], epoch=10)
    assert chosen(manager, [A, B]) == [A, B], "better than none"


def test_an_address_that_begins_another_one_is_not_taken_for_it():
    short, long = "10.0.0.1:5005", "10.0.0.1:50051"
    _, registry, _ = make_manager_of({short: "0:2", long: "2:4"})
    lose(registry, [short, long], Unavailable(f"{long}: no answer for 4.0 s", addresses=[long]))
    describe(registry, short, "0:2")
    describe(registry, long, "2:4")
    assert [shard.is_quarantined for shard in registry.shards.values()] == [False, True]


def test_an_address_in_the_text_of_an_error_puts_nobody_into_quarantine():
    _, registry, _ = make_manager(a="0:2", b="2:4")
    lose(registry, [A, B], Unavailable(f"{A} says that {B} does not answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert [shard.is_quarantined for shard in registry.shards.values()] == [False, True]


def test_where_a_loss_names_no_stage_others_are_taken_as_far_as_there_are_any():
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="2:4")
    lose(registry, [A, B], Unavailable("a step is under way, and no stage has computed for 4.0 s"))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(manager, [A, B]) == [A, C]


def test_a_shard_that_was_started_again_is_not_in_quarantine():
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="2:4")
    lose(registry, [A, B], Unavailable("Socket closed", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4", process_id="another process")
    assert chosen(manager, [A, B]) == [A, B]


def test_a_quarantine_ends(monkeypatch):
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="2:4")
    monkeypatch.setattr("stagecoach_router.pipelines.shard.QUARANTINE_S", -1.0)
    lose(registry, [A, B], Unavailable("no answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(manager, [A, B]) == [A, B]


def test_while_a_quarantined_shard_is_tried_again_a_spare_gets_ready():
    manager, registry, loads = make_manager(a="0:2", b="2:4", c="auto")
    lose(registry, [A, B], Unavailable("no answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(manager, [A, B]) == [A, B]
    assert loads == [(C, "2:4")]


def test_of_a_link_that_breaks_both_ends_are_quarantined_and_a_spare_takes_the_place_of_one():
    manager, registry, loads = make_manager(a="0:2", b="2:4", c="auto")
    lose(registry, [A, B], Unavailable("Socket closed", addresses=[A, B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert choice(manager, [A, B]).is_second_choice
    assert loads == [(C, "2:4")]
    registry.shards[C].begin_load(LayerRange(2, 4))
    assert choice(manager, [A, B], may_load=False).is_second_choice


async def test_a_quarantined_shard_is_taken_again_only_when_the_spare_takes_too_long(monkeypatch):
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="auto")
    lose(registry, [A, B], Unavailable("no answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")

    def load(address, layers):
        registry.shards[address].begin_load(layers)

    registry.load = load
    waits = []

    async def changed(timeout_s):
        waits.append(timeout_s)
        if len(waits) == 3:  # it has loaded
            registry.shards[C].loading = None
            describe(registry, C, "2:4")

    registry.changed = changed
    assert await manager._find([A, B], is_wanted=True) == [A, C]
    assert len(waits) == 3
    monkeypatch.setattr(pipeline_manager, "QUARANTINE_PATIENCE_S", 0.0)
    registry.shards[C].description = None
    registry.shards[C].begin_load(LayerRange(2, 4))
    assert await manager._find([A, B], is_wanted=True) == [A, B]


def test_a_refusal_for_want_of_room_is_nobodys_fault():
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="2:4")
    lose(registry, [A, B], KVCacheFull.of_blocks(needed=2, free=1))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(manager, [A, B]) == [A, B]


def test_shards_whose_blocks_others_hold_are_left_out_as_long_as_there_are_others():
    manager, registry, _ = make_manager(a="0:2", b="2:4", c="2:4")
    describe(registry, B, "2:4", num_free_blocks=1)
    assert chosen(manager, [A, B]) == [A, C]
    registry.take([C], epoch=1)
    assert chosen(manager, [A, B]) == [A, B], "it says how much it lacks"


@pytest.mark.parametrize("quarantined", [False, True])
async def test_shards_without_room_are_asked_all_the_same_where_there_are_no_others(quarantined):
    """As at the start of a router whose predecessor still holds all blocks: it has to wait, not to end."""
    manager, registry, _ = make_manager(a="0:2", b="2:4")
    for address, layers in ((A, "0:2"), (B, "2:4")):
        describe(registry, address, layers, num_free_blocks=0)
    if quarantined:
        registry.quarantine([B])
    assert await manager._find([], is_wanted=True) == [A, B]


def test_a_spare_loads_what_is_missing_once():
    manager, registry, loads = make_manager(a="0:2", c="auto", d="auto")
    assert chosen(manager, [A, B]) == []
    assert loads == [(C, "2:4")]
    registry.shards[C].begin_load(LayerRange(2, 4))
    assert chosen(manager, [A, B]) == []
    assert len(loads) == 1


def test_one_that_falls_silent_while_it_loads_is_not_waited_for():
    manager, registry, loads = make_manager(a="0:2", c="auto", d="auto")
    registry.shards[C].begin_load(LayerRange(2, 4))
    registry.shards[C].error = Unavailable("loading", field="layers")
    assert chosen(manager, [A, B]) == []
    assert loads == []
    registry.shards[C].error = Unavailable("no answer to Describe in 5 s")
    assert chosen(manager, [A, B]) == []
    assert loads == [(D, "2:4")]


def test_nothing_is_loaded_before_all_have_answered_or_had_their_time(monkeypatch):
    manager, registry, loads = make_manager(a="auto", b="auto")
    registry.shards[B].description = None
    assert isinstance(choice(manager).error, TopologyError)
    assert loads == []
    monkeypatch.setattr(pipeline_manager, "START_PATIENCE_S", 0.0)
    assert chosen(manager) == []
    assert loads == [(A, "0:4")]


async def test_a_shard_that_loads_something_else_is_an_error(monkeypatch):
    async def assign(request, timeout):
        return shard_pb2.AssignResponse()

    monkeypatch.setattr(shard_client, "ShardStub", lambda channel: SimpleNamespace(assign=assign))
    with pytest.raises(ShardFault, match="has 0:0"):
        await shard_client.assign("127.0.0.1:1", LayerRange(0, 2), fingerprint="f")


async def test_what_another_router_has_changed_since_a_shard_was_asked_is_a_matter_of_time():
    class Reassigned:
        async def open(self, **_):
            raise FailedPrecondition("no layers yet", addresses=[B])

    with pytest.raises(Unavailable, match="no layers yet") as caught:
        await pipeline_manager._open_as_described(Reassigned(), 8, 4)
    assert caught.value.addresses == (B,)


def test_layers_are_loaded_for_a_further_pipeline_only_as_far_as_so_many_are_wanted():
    manager, _, loads = make_manager(PipelineSettings(num_stages=2, num_replicas=2), a="auto", b="auto")
    assert not manager.is_ready_for(3)
    assert loads == []
    assert not manager.is_ready_for(2)
    assert loads == [(A, "0:2"), (B, "2:4")]


def test_shards_with_layers_make_further_pipelines_whether_they_are_wanted_or_not():
    manager, _, loads = make_manager(a="0:2", b="2:4")
    assert manager.is_ready_for(7)
    assert loads == []


def test_spares_that_have_loaded_ahead_make_no_pipeline_that_nobody_asked_for():
    """Standing by is what they are for: with their layers they would else be taken at once."""
    layers = {A: "0:2", B: "2:4", C: "auto", D: "auto"}
    manager, registry, loads = make_manager_of(layers)
    registry.take([A, B], epoch=1)
    manager.stand_by()
    assert loads == [(C, "0:2"), (D, "2:4")]
    for address, held in loads:
        describe(registry, address, held, assignable=True)
    assert not manager.is_ready_for(2)
    manager.stand_by()
    assert len(loads) == 2
    wanted = PipelineManager(registry, PipelineSettings(num_replicas=2), PipelineContext(lease_id=1))
    assert wanted.is_ready_for(2)
    registry.release([A, B], epoch=1)
    describe(registry, A, "0:2")
    assert chosen(manager, [A, B]) == [A, D], "at once"


def test_what_a_lost_stage_needs_is_loaded_over_what_was_loaded_ahead():
    manager, registry, loads = make_manager(a="0:2", b="2:4")
    registry.shards[C] = Shard(C)
    describe(registry, C, "0:2", assignable=True)
    registry.shards[B].learn(None, Unavailable("connection refused"))
    assert chosen(manager, [A, B]) == []
    assert loads == [(C, "2:4")], "the range in use, and no other split"
