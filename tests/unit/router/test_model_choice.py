"""Which model a router serves when its shards do not agree, and what becomes of those that have another one."""

from __future__ import annotations

import pytest

from stagecoach.errors import CheckpointError, ModelMismatch, PermissionDenied, TopologyError, Unavailable
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.pipelines import model_choice, pipeline_manager
from stagecoach_router.pipelines.model_choice import UNUSABLE_S, ModelChoice, choose_model
from stagecoach_router.pipelines.pipeline import PipelineContext
from stagecoach_router.pipelines.pipeline_manager import PipelineManager, PipelineSettings
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.shard_registry import ShardRegistry

NUM_LAYERS = 4


def said(address, layers, *, model="honest", files="files", **facts):
    """What the shard at `address` says; `layers` is "START:END", or "auto"."""
    start, end = (0, 0) if layers == "auto" else map(int, layers.split(":"))
    return ShardDescription(
        address,
        shard_pb2.DescribeResponse(
            shard_id=address,
            process_id=address,
            model=model_pb2.ModelDescription(fingerprint=model, num_layers=NUM_LAYERS),
            layers=model_pb2.LayerRange(start=start, end=end),
            assignable=layers == "auto",
            num_free_blocks=100,
            files_digest=files,
            **facts,
        ),
    )


HONEST = said("a:1", "0:2"), said("b:1", "2:4")


@pytest.mark.parametrize("layers", ["0:2", "2:4", "1:3", "0:4"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("lie", [{"model": "other"}, {"files": "other"}, {"block_size": 3}])
def test_one_that_says_something_else_than_a_whole_chain_of_others_is_left_out(layers, place, lie):
    shards = list(HONEST)
    shards.insert(place, said("liar:1", layers, **lie))
    choice = ModelChoice()
    choice.choose(shards)
    assert [choice.why_not(shard) for shard in HONEST] == [None, None]
    assert isinstance(choice.why_not(shards[place]), ModelMismatch)


def test_a_whole_chain_counts_for_more_than_many_shards():
    others = [said(f"x{number}:1", "0:3", model="other") for number in range(5)]
    assert choose_model([*others, *HONEST]) == HONEST[0]


def test_of_two_whole_chains_it_is_the_one_of_more_shards_and_then_the_first():
    whole = said("w:1", "0:4", model="other")
    assert choose_model([whole, *HONEST]) == HONEST[0]
    assert choose_model([whole, said("v:1", "0:4")]) == whole


def test_shards_that_can_load_layers_make_a_chain_too():
    autos = [said("c:1", "auto"), said("d:1", "auto")]
    assert choose_model([said("liar:1", "2:4", model="other"), *autos]) == autos[0]


def test_a_stage_needs_no_tokenizer():
    bare = said("bare:1", "2:4", files="")
    choice = ModelChoice()
    choice.choose([bare, HONEST[0]])
    assert choice.reference == HONEST[0], "which has the files"
    assert choice.why_not(bare) is None


def test_who_has_files_that_cannot_be_used_is_no_choice_until_they_are_tried_again(monkeypatch):
    liar = said("liar:1", "0:4", files="broken")
    bare = said("bare:1", "0:2", files="")
    choice = ModelChoice()
    choice.choose([liar])
    assert choice.reference == liar
    error = CheckpointError("tokenizer.json cannot be read")
    choice.reject_files("broken", error, UNUSABLE_S)
    choice.choose([liar, bare])
    assert choice.reference == bare, "its layers are as good as any"
    choice.choose([liar])
    assert choice.reference is None
    assert choice.why_not(liar) is error
    choice.choose([liar, *HONEST])
    assert choice.reference == HONEST[0]
    assert choice.why_not(liar) is error
    choice.reject_files("broken", error, -1.0)
    choice.choose([liar])
    assert choice.reference == liar


def test_it_is_never_another_one_once_a_pipeline_was_open():
    choice = ModelChoice()
    choice.choose([HONEST[0]])
    choice.settle(HONEST[0])
    choice.choose([said(f"x{number}:1", "0:4", model="other") for number in range(5)])
    assert choice.reference == HONEST[0]


@pytest.mark.parametrize("other", [said("b:1", "2:4", files="edited"), said("b:1", "2:4", files="")])
def test_once_the_router_has_the_files_a_shard_may_come_back_with_others(other):
    choice = ModelChoice()
    choice.choose(HONEST)
    choice.settle(HONEST[0])
    assert choice.why_not(other) is None


def test_a_router_with_files_of_its_own_does_not_mind_those_of_the_shards():
    other = said("b:1", "2:4", files="edited")
    choice = ModelChoice(fetches_files=False)
    choice.choose([HONEST[0], other])
    assert choice.why_not(HONEST[0]) is None
    assert choice.why_not(other) is None


# ---- what the pipeline manager makes of it


def make_manager(*answers):
    """Of shards at as many addresses; an error is what asking one comes to, None that it was not asked yet."""
    addresses = [f"{name}:1" for name in "abc"[: len(answers)]]
    registry = ShardRegistry(addresses, lease_id=1, timeout_s=1.0)
    for shard, answer in zip(registry.shards.values(), answers, strict=True):
        if isinstance(answer, ShardDescription):
            shard.learn(answer)
        elif answer is not None:
            shard.learn(None, answer)
    return PipelineManager(registry, PipelineSettings(), PipelineContext(lease_id=1)), registry


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(pipeline_manager, "FIND_TIMEOUT_S", 0.02)
    monkeypatch.setattr(pipeline_manager, "MODEL_PATIENCE_S", 0.01)


@pytest.mark.parametrize(
    "answer",
    [
        said("c:1", "0:4", model="other"),
        ModelMismatch("num_free_blocks: c:1 has 9; it must be in [0, 4]", addresses=["c:1"]),
        PermissionDenied("c:1: the caller's certificate is for another name"),
        Unavailable("c:1: refused"),
    ],
)
async def test_whatever_one_shard_says_the_others_make_the_pipeline(answer):
    manager, registry = make_manager(*HONEST, answer)
    assert (await manager.choose_model()) == HONEST[0]
    assert manager._choose([], may_load=True).addresses == ["a:1", "b:1"]
    assert "c:1" in registry.shards["c:1"].reason


@pytest.mark.parametrize(
    "error", [PermissionDenied("a:1: another name"), ModelMismatch("a:1 has 9"), Unavailable("no")]
)
async def test_shards_that_do_not_let_us_in_are_waited_for_with_the_reason(error):
    manager, _ = make_manager(error)
    with pytest.raises(Unavailable, match=str(error)):
        await manager.choose_model()


@pytest.mark.parametrize(
    ("shards", "kind"),
    [
        ([said("a:1", "0:2"), said("b:1", "2:4", model="other")], ModelMismatch),
        ([said("a:1", "0:2"), said("b:1", "2:4", files="other")], ModelMismatch),
        ([said("a:1", "0:2"), said("b:1", "3:4")], TopologyError),
    ],
)
async def test_where_all_have_answered_and_nothing_fits_it_is_an_error_for_good(shards, kind):
    manager, _ = make_manager(*shards)
    await manager.choose_model()
    with pytest.raises(kind):
        await manager._find([], is_wanted=True)


async def test_where_one_has_not_answered_nothing_is_for_good(monkeypatch):
    monkeypatch.setattr(pipeline_manager, "START_PATIENCE_S", 0.0)
    manager, _ = make_manager(said("a:1", "0:2"), said("b:1", "2:4", model="other"), Unavailable("c:1: refused"))
    await manager.choose_model()
    with pytest.raises(Unavailable, match="fingerprint"):
        await manager._find([], is_wanted=True)


async def test_a_chain_that_came_while_another_was_looked_for_is_taken_the_next_time(monkeypatch):
    monkeypatch.setattr(pipeline_manager, "START_PATIENCE_S", 0.0)
    manager, registry = make_manager(said("a:1", "0:2", model="other"), None, None)
    await manager.choose_model()
    registry.learn(said("b:1", "0:2"))
    registry.learn(said("c:1", "2:4"))
    with pytest.raises(Unavailable):
        await manager._find([], is_wanted=True)
    assert (await manager.choose_model()).address == "b:1"
    assert await manager._find([], is_wanted=True) == ["b:1", "c:1"]


REFUSED = Unavailable("nobody is there")


async def test_the_first_to_answer_does_not_decide_for_those_that_come_a_little_later():
    """As after a loss of power: it may lie, or have been forgotten, and has a whole chain by itself."""
    manager, registry = make_manager(said("a:1", "0:4", model="other"), REFUSED, REFUSED)
    with pytest.raises(Unavailable, match="1 of 3 shards"):
        await manager.choose_model()
    registry.learn(said("b:1", "0:2"))
    registry.learn(said("c:1", "2:4"))
    assert (await manager.choose_model()).address == "b:1"


async def test_most_of_the_shards_decide_without_the_others():
    manager, _ = make_manager(*HONEST, REFUSED)
    assert await manager.choose_model() == HONEST[0]


async def test_who_cannot_be_of_any_model_is_not_waited_for():
    manager, _ = make_manager(said("a:1", "0:4"), ModelMismatch("b:1 has 9"), PermissionDenied("c:1: another name"))
    assert (await manager.choose_model()).address == "a:1"


async def test_few_decide_where_the_others_do_not_come(monkeypatch):
    manager, _ = make_manager(said("a:1", "0:4"), REFUSED)
    with pytest.raises(Unavailable):
        await manager.choose_model()
    monkeypatch.setattr(pipeline_manager, "START_PATIENCE_S", 0.0)
    assert (await manager.choose_model()).address == "a:1"


async def test_few_never_decide_against_the_journal(monkeypatch):
    """Its requests could not go on, and the router would have to end."""
    monkeypatch.setattr(pipeline_manager, "START_PATIENCE_S", 0.0)
    manager, registry = make_manager(said("a:1", "0:4", model="other"), REFUSED)
    registry.choice.expect("honest")
    with pytest.raises(Unavailable, match="the journal is of another one"):
        await manager.choose_model()
    registry.learn(said("b:1", "0:4"))
    assert (await manager.choose_model()).address == "b:1", "of two chains that of the journal"


async def test_where_all_have_another_model_than_the_journal_it_is_chosen():
    """The operator has changed it: reading the journal then ends with what to do."""
    manager, registry = make_manager(said("a:1", "0:4", model="other"), said("b:1", "0:4", model="other"))
    registry.choice.expect("honest")
    assert (await manager.choose_model()).address == "a:1"


async def test_many_reasons_make_no_long_error(monkeypatch):
    addresses = [f"s{number}:1" for number in range(1000)]
    registry = ShardRegistry(addresses, lease_id=1, timeout_s=1.0)
    for address in addresses:
        registry.shards[address].learn(None, Unavailable(f"{address}: " + 600 * "x"))
    manager = PipelineManager(registry, PipelineSettings(), PipelineContext(lease_id=1))
    with pytest.raises(Unavailable, match="996 more shards") as caught:
        await manager.choose_model()
    assert len(caught.value.message) < 4000


def test_files_are_rejected_for_a_while_only():
    assert 0 < model_choice.NOT_HAD_S < model_choice.UNUSABLE_S
