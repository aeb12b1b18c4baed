"""Which shards the pipeline manager takes, which it has load layers, and whom it rather leaves out. No network."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stagecoach.errors import FailedPrecondition, KVCacheFull, TopologyError, Unavailable
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.metrics.counters import PipelineTotals
from stagecoach_router.pipelines import pipeline_manager as pipeline_manager
from stagecoach_router.pipelines import shard_client as discovery
from stagecoach_router.pipelines.pipeline_manager import PipelineManager, PipelineSettings
from stagecoach_router.pipelines.shard_client import Stage
from stagecoach_router.pipelines.shard_registry import ShardRegistry
from stagecoach_router.pipelines.watchdog import FaultLimits

NUM_LAYERS = 4
A, B, C, D = "a:1", "b:1", "c:1", "d:1"


def describe(registry, address, layers, *, num_free_blocks=100, shard_id=""):
    """The shard has answered: `layers` is "START:END", or "auto"."""
    start, end = (0, 0) if layers == "auto" else map(int, layers.split(":"))
    member = registry.members[address]
    member.stage = Stage(
        address,
        shard_pb2.DescribeResponse(
            shard_id=shard_id or address,
            model=model_pb2.ModelDescription(fingerprint="f", num_layers=NUM_LAYERS),
            layers=model_pb2.LayerRange(start=start, end=end),
            assignable=layers == "auto" or address == D,
            num_free_blocks=num_free_blocks,
        ),
    )
    member.error, member.asked = None, True


def make_pipeline_manager(**layers):
    """A pipeline_manager of shards that have answered, and what it has had them load."""
    addresses = [f"{name}:1" for name in layers]
    registry = ShardRegistry(addresses, lease_id=1, timeout_s=1.0)
    for address, held in zip(addresses, layers.values(), strict=True):
        describe(registry, address, held)
    settings = PipelineSettings(
        num_stages=0, num_replicas=0, kv_blocks=0, lanes=0, max_slots=4, faults=FaultLimits(5.0, 120.0)
    )
    loads = []
    registry.load = lambda address, layers: loads.append((address, str(layers)))
    return PipelineManager(registry, settings, lease_id=1, totals=PipelineTotals()), registry, loads


def chosen(some_pipelines, former=(), *, may_load=True):
    chain = some_pipelines._look(list(former), may_load=may_load)
    return None if chain is None else [link.address for link in chain]


def test_a_shard_is_given_up_only_by_the_pipeline_that_it_is_in():
    _, registry, _ = make_pipeline_manager(a="0:2", b="2:4")
    registry.take([A, B], epoch=1)
    registry.release([A, B], epoch=1)
    describe(registry, A, "0:2")
    registry.take([A], epoch=2)
    registry.release([A, B], epoch=1)  # as when an open fails after its pipeline was lost
    assert registry.members[A].epoch == 2
    assert [member.address for member in registry.free] == [B]


def lose(some_pipelines, registry, addresses, error):
    registry.take(addresses, epoch=9)
    some_pipelines._let_go(list(addresses), 9, error)


def test_the_stage_that_a_loss_names_is_second_choice():
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="2:4")
    assert chosen(some_pipelines) == [A, B]
    lose(some_pipelines, registry, [A, B], Unavailable("no answer for 4.0 s", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(some_pipelines, [A, B]) == [A, C]
    registry.take([C], epoch=10)
    assert chosen(some_pipelines, [A, B]) == [A, B], "better than none"


def test_an_address_that_begins_another_one_is_not_taken_for_it():
    short, long = "10.0.0.1:5005", "10.0.0.1:50051"
    registry = ShardRegistry([short, long], lease_id=1, timeout_s=1.0)
    describe(registry, short, "0:2")
    describe(registry, long, "2:4")
    settings = PipelineSettings(
        num_stages=0, num_replicas=0, kv_blocks=0, lanes=0, max_slots=4, faults=FaultLimits(5.0, 120.0)
    )
    manager = PipelineManager(registry, settings, lease_id=1, totals=PipelineTotals())
    lose(manager, registry, [short, long], Unavailable(f"{long}: no answer for 4.0 s", addresses=[long]))
    describe(registry, short, "0:2")
    describe(registry, long, "2:4")
    assert [member.is_quarantined for member in registry.members.values()] == [False, True]


def test_where_a_loss_names_no_stage_others_are_taken_as_far_as_there_are_any():
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="2:4")
    lose(some_pipelines, registry, [A, B], Unavailable("a step is under way, and no stage has computed for 4.0 s"))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(some_pipelines, [A, B]) == [A, C]


def test_a_shard_that_was_started_again_is_not_to_blame():
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="2:4")
    lose(some_pipelines, registry, [A, B], Unavailable("Socket closed", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4", shard_id="another process")
    assert chosen(some_pipelines, [A, B]) == [A, B]


def test_blame_ends(monkeypatch):
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="2:4")
    monkeypatch.setattr("stagecoach_router.pipelines.shard_registry.QUARANTINE_S", -1.0)
    lose(some_pipelines, registry, [A, B], Unavailable("no answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(some_pipelines, [A, B]) == [A, B]


def test_while_a_blamed_shard_is_tried_again_a_spare_gets_ready():
    some_pipelines, registry, loads = make_pipeline_manager(a="0:2", b="2:4", c="auto")
    lose(some_pipelines, registry, [A, B], Unavailable("no answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(some_pipelines, [A, B]) == [A, B]
    assert loads == [(C, "2:4")]


def test_a_link_that_breaks_is_blamed_on_both_ends_and_a_spare_takes_one_of_them():
    some_pipelines, registry, loads = make_pipeline_manager(a="0:2", b="2:4", c="auto")
    lose(some_pipelines, registry, [A, B], Unavailable("Socket closed", addresses=[A, B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    chosen(some_pipelines, [A, B])
    assert loads == [(C, "2:4")]
    registry.members[C].loading = LayerRange(2, 4)
    assert some_pipelines._waits_for_better([A, B], some_pipelines._look([A, B], may_load=False))


async def test_a_blamed_shard_is_taken_again_only_when_the_spare_takes_too_long(monkeypatch):
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="auto")
    lose(some_pipelines, registry, [A, B], Unavailable("no answer", addresses=[B]))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")

    def load(address, layers):
        registry.members[address].loading = layers

    registry.load = load
    waits = []

    async def changed(timeout_s):
        waits.append(timeout_s)
        if len(waits) == 3:  # it has loaded
            registry.members[C].loading = None
            describe(registry, C, "2:4")

    registry.changed = changed
    chain = await some_pipelines._find([A, B], may_load=True)
    assert [link.address for link in chain] == [A, C]
    monkeypatch.setattr(pipeline_manager, "QUARANTINE_PATIENCE_S", 0.0)
    registry.members[C].stage = None
    registry.members[C].loading = LayerRange(2, 4)
    chain = await some_pipelines._find([A, B], may_load=True)
    assert [link.address for link in chain] == [A, B]


def test_a_refusal_for_want_of_room_is_nobodys_fault():
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="2:4")
    lose(some_pipelines, registry, [A, B], KVCacheFull.of_blocks(needed=2, free=1))
    describe(registry, A, "0:2")
    describe(registry, B, "2:4")
    assert chosen(some_pipelines, [A, B]) == [A, B]


def test_shards_whose_blocks_others_hold_are_left_out_as_long_as_there_are_others():
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4", c="2:4")
    describe(registry, B, "2:4", num_free_blocks=1)
    assert chosen(some_pipelines, [A, B]) == [A, C]
    registry.take([C], epoch=1)
    assert chosen(some_pipelines, [A, B]) == [A, B], "it says how much it lacks"


@pytest.mark.parametrize("quarantined", [False, True])
async def test_shards_without_room_are_asked_all_the_same_where_there_are_no_others(quarantined):
    """As at the start of a router whose predecessor still holds all blocks: it has to wait, not to end."""
    some_pipelines, registry, _ = make_pipeline_manager(a="0:2", b="2:4")
    for address, layers in ((A, "0:2"), (B, "2:4")):
        describe(registry, address, layers, num_free_blocks=0)
    if quarantined:
        registry.quarantine([B])
    chain = await some_pipelines._find([], may_load=True)
    assert [link.address for link in chain] == [A, B]


def test_a_spare_loads_what_is_missing_once():
    some_pipelines, registry, loads = make_pipeline_manager(a="0:2", c="auto", d="auto")
    assert chosen(some_pipelines, [A, B]) is None
    assert loads == [(C, "2:4")]
    registry.members[C].loading = LayerRange(2, 4)
    assert chosen(some_pipelines, [A, B]) is None
    assert len(loads) == 1


def test_one_that_falls_silent_while_it_loads_is_not_waited_for():
    some_pipelines, registry, loads = make_pipeline_manager(a="0:2", c="auto", d="auto")
    registry.members[C].loading = LayerRange(2, 4)
    registry.members[C].error = Unavailable("loading", field="layers")
    assert chosen(some_pipelines, [A, B]) is None
    assert loads == []
    registry.members[C].error = Unavailable("no answer to Describe in 5 s")
    assert chosen(some_pipelines, [A, B]) is None
    assert loads == [(D, "2:4")]


def test_nothing_is_loaded_before_all_have_answered_or_had_their_time(monkeypatch):
    some_pipelines, registry, loads = make_pipeline_manager(a="auto", b="auto")
    registry.members[B].stage = None
    with pytest.raises(TopologyError):
        chosen(some_pipelines)
    monkeypatch.setattr(pipeline_manager, "START_PATIENCE_S", 0.0)
    assert chosen(some_pipelines) is None
    assert loads == [(A, "0:4")]


async def test_a_shard_that_loads_something_else_is_an_error(monkeypatch):
    async def assign(request, timeout):
        return shard_pb2.AssignResponse()

    monkeypatch.setattr(discovery, "ShardStub", lambda channel: SimpleNamespace(assign=assign))
    with pytest.raises(discovery.errors.ShardFault, match="has 0:0"):
        await discovery.assign("127.0.0.1:1", LayerRange(0, 2), fingerprint="f")


async def test_what_another_router_has_changed_since_a_shard_was_asked_is_a_matter_of_time():
    class Reassigned:
        async def open(self, **_):
            raise FailedPrecondition("no layers yet")

    with pytest.raises(Unavailable, match="no layers yet"):
        await pipeline_manager._open_as_described(Reassigned(), 8, 4)


async def test_layers_are_loaded_for_a_further_pipeline_only_while_all_others_are_open():
    some_pipelines, _, loads = make_pipeline_manager(a="auto", b="auto")
    some_pipelines._settings = PipelineSettings(
        num_stages=2, num_replicas=2, kv_blocks=0, lanes=0, max_slots=4, faults=FaultLimits(5.0, 120.0)
    )

    class Stop(Exception):
        pass

    def changed_after(_):
        raise Stop

    some_pipelines.registry.changed = changed_after
    with pytest.raises(Stop):
        await some_pipelines.another(1, lambda: False)
    assert loads == []
    with pytest.raises(Stop):
        await some_pipelines.another(1, lambda: True)
    assert loads == [(A, "0:2"), (B, "2:4")]
