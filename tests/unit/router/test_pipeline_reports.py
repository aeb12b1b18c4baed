"""What a pipeline makes of its stages' load reports and timings, without a network."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest

from stagecoach.errors import InternalError, ShardFault, ShardStopping, StagecoachError, Unavailable
from stagecoach.errors.status import to_status
from stagecoach.rpc.framing import FrameCounter, write_frame
from stagecoach.v1 import model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.metrics.load_report import LoadReport
from stagecoach_router.pipelines import pipeline as pipeline_module
from stagecoach_router.pipelines import stage_session
from stagecoach_router.pipelines.pipeline import Pipeline, PipelineContext, check_timings
from stagecoach_router.pipelines.shard_description import ShardDescription
from stagecoach_router.pipelines.stage_session import StageSession, read_fault


class NoListener:
    def result_came(self, result: pb.StepResult, payload: memoryview) -> None: ...

    def pipeline_lost(self, error: StagecoachError) -> None: ...


def shard(address: str, **facts: Any) -> ShardDescription:
    known = {
        "layers": model_pb2.LayerRange(start=0, end=2),
        "max_batch_tokens": 8,
        "model": model_pb2.ModelDescription(hidden_size=8),
    }
    return ShardDescription(address, pb.DescribeResponse(shard_id="x", **(known | facts)))


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline([shard("shard:0"), shard("shard:1")], 1, NoListener(), PipelineContext(lease_id=1))


async def test_stages_that_do_not_report_are_not_waited_for_longer_than_said(pipeline: Pipeline) -> None:
    await asyncio.wait_for(pipeline.refresh_loads(0.001), 5.0)
    assert not any(stage._awaited_reports for stage in pipeline.stages)


async def test_it_waits_for_a_report_that_was_asked_for_after_it_was_wanted(pipeline: Pipeline) -> None:
    waiting = asyncio.create_task(pipeline.refresh_loads(60.0))
    for stage in pipeline.stages:
        await stage._was_asked.wait()
    for number in (0, 1):  # by itself, and asked for
        for stage in pipeline.stages:
            assert not waiting.done()
            stage.take_load(LoadReport(number=number, queue_depth=3))
        await asyncio.sleep(0)
    await asyncio.wait_for(waiting, 5.0)
    assert [stage.queue_depth for stage in pipeline.stages] == [3, 3]


async def test_a_report_of_a_pipeline_that_is_lost_meanwhile_is_not_waited_for(pipeline: Pipeline) -> None:
    """Whoever asks for a status then would learn of the loss a second late."""
    waiting = asyncio.create_task(pipeline.refresh_loads(60.0))
    for stage in pipeline.stages:
        await stage._was_asked.wait()
    pipeline.session_ended(Unavailable("Socket closed"))
    await asyncio.wait_for(waiting, 5.0)


@pytest.mark.parametrize(
    "timings",
    [
        [pb.StageTiming()],
        [pb.StageTiming()] * 3,
        [pb.StageTiming(), pb.StageTiming(compute_s=math.nan)],
        [pb.StageTiming(queue_s=-1.0), pb.StageTiming()],
        [pb.StageTiming(decode_s=math.inf), pb.StageTiming()],
    ],
)
def test_timings_that_two_stages_cannot_have_are_a_fault(timings: list[pb.StageTiming]) -> None:
    with pytest.raises(ShardFault) as caught:
        check_timings(pb.StepResult(timings=timings), 2)
    assert caught.value.field == "timings"


@pytest.mark.parametrize("timings", [[], [pb.StageTiming(compute_s=1.0)] * 2])
def test_timings_of_every_stage_or_of_none_will_do(timings: list[pb.StageTiming]) -> None:
    check_timings(pb.StepResult(timings=timings), 2)


def test_a_fault_is_about_the_stage_that_reports_it_and_about_the_other_end_of_its_broken_link() -> None:
    listener: Any = None
    stage = StageSession(shard("a:1"), listener, FrameCounter())
    own = pb.Fault(status=to_status(ShardFault("step 3 failed")))
    assert read_fault(own, stage).addresses == ("a:1",)
    link = pb.Fault(status=to_status(Unavailable("b:1: Socket closed", addresses=["b:1"])))
    assert read_fault(link, stage).addresses == ("a:1", "b:1")


def test_a_stage_that_says_that_it_stops_is_told_from_one_that_broke() -> None:
    listener: Any = None
    stage = StageSession(shard("a:1"), listener, FrameCounter())
    stopping = read_fault(pb.Fault(status=to_status(ShardStopping("the shard is stopping"))), stage)
    assert (type(stopping), stopping.addresses) == (ShardStopping, ("a:1",))
    # By its class, never by its words.
    assert type(read_fault(pb.Fault(status=to_status(Unavailable("the shard is stopping"))), stage)) is ShardFault


class FramesOfAShard:
    """A session's call that has these frames to read."""

    def __init__(self, *frames: bytes) -> None:
        self.left = list(frames)

    async def read(self) -> bytes:
        return self.left.pop(0)


class Told:
    """A listener that remembers what it is told."""

    def __init__(self) -> None:
        self.ends: list[StagecoachError] = []
        self.num_loads = 0

    def result_came(
        self, session: StageSession, result: pb.StepResult, payload: memoryview, message_bytes: int
    ) -> None: ...

    def load_came(self, session: StageSession, report: LoadReport) -> None:
        self.num_loads += 1

    def session_ended(self, error: StagecoachError) -> None:
        self.ends.append(error)


async def test_a_fault_ends_a_session_once_and_nothing_that_comes_after_it_is_read() -> None:
    load = write_frame(pb.SessionResponse(load=pb.LoadReport()))
    fault = write_frame(pb.SessionResponse(fault=pb.Fault(status=to_status(ShardFault("step 3 failed")))))
    told, call = Told(), FramesOfAShard(load, fault, load, fault)
    await StageSession(shard("a:1"), told, FrameCounter())._read(call)  # type: ignore[arg-type]
    assert told.num_loads == 1
    assert [(type(end), end.addresses) for end in told.ends] == [(ShardFault, ("a:1",))]
    assert call.left == [load, fault]


async def test_an_error_that_nobody_foresaw_in_asking_ends_a_session_once() -> None:
    """Its shard would have seemed to be silent."""
    told = Told()
    stage = StageSession(shard("a:1"), told, FrameCounter())

    async def write(request: pb.SessionRequest) -> None:
        raise ZeroDivisionError("a bug")

    stage.ask_for_load(1)
    await asyncio.wait_for(stage._ask(SimpleNamespace(write=write)), 5.0)  # type: ignore[arg-type]
    fault = write_frame(pb.SessionResponse(fault=pb.Fault(status=to_status(ShardFault("step 3 failed")))))
    await stage._read(FramesOfAShard(fault))  # type: ignore[arg-type]
    assert [(type(end), end.addresses) for end in told.ends] == [(InternalError, ("a:1",))]


async def test_a_result_that_nobody_has_asked_for_loses_the_pipeline_and_names_the_stage(pipeline: Pipeline) -> None:
    """As from a shard that sends one while the other sessions are still being opened."""
    result = write_frame(pb.SessionResponse(result=pb.StepResult(epoch=1, step=1)))
    last = pipeline.stages[-1]
    await last._read(FramesOfAShard(result))  # type: ignore[arg-type]
    assert isinstance(pipeline.lost, ShardFault)
    assert pipeline.lost.addresses == (last.address,)
    assert "for which nobody has asked it" in pipeline.lost.message


@pytest.mark.parametrize(
    ("dtype", "most"), [(model_pb2.DTYPE_FLOAT32, 3840), (model_pb2.DTYPE_BFLOAT16, 7680), (99, 3840)]
)
def test_a_step_is_never_larger_than_its_hidden_states_may_be_in_a_message(dtype: int, most: int) -> None:
    facts = {"max_batch_tokens": 16384, "model": model_pb2.ModelDescription(hidden_size=8192), "dtype": dtype}
    context = PipelineContext(lease_id=1)
    assert Pipeline([shard("a:1", **facts), shard("b:1", **facts)], 1, NoListener(), context).max_batch_tokens == most
    facts["max_batch_tokens"] = 100
    assert Pipeline([shard("a:1", **facts), shard("b:1", **facts)], 1, NoListener(), context).max_batch_tokens == 100


async def test_a_stage_that_breaks_while_another_is_opened_breaks_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count as open: its model as chosen for good, and its shards as broken by what came later."""
    told: list[StagecoachError] = []
    listener = NoListener()
    listener.pipeline_lost = told.append  # type: ignore[method-assign]
    pipeline = Pipeline([shard("shard:0"), shard("shard:1")], 1, listener, PipelineContext(lease_id=1))
    fault = ShardFault("out of memory", addresses=["shard:0"])

    async def open_well(*_: object) -> None:
        pass

    async def open_after_the_other_broke(*_: object) -> None:
        pipeline.session_ended(fault)

    link = SimpleNamespace(open=open_well, close=open_well)
    monkeypatch.setattr(pipeline_module, "ForwardLink", lambda *_, **__: link)
    pipeline.stages[0].open = open_well  # type: ignore[method-assign]
    pipeline.stages[1].open = open_after_the_other_broke  # type: ignore[method-assign]
    with pytest.raises(ShardFault) as caught:
        await pipeline.open(num_blocks=1, max_slots=1)
    assert caught.value is fault
    assert told == [], "who opens it knows by the error"


async def test_where_one_stage_refuses_its_lease_the_others_are_not_opened_behind_its_back(pipeline: Pipeline) -> None:
    """A lease that is opened after the pipeline was closed would hold its blocks until somebody notices."""
    ended: list[str] = []

    async def refuse(*_: object) -> None:
        await asyncio.sleep(0)
        raise Unavailable("no")

    async def take_long(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    pipeline.stages[0].open = take_long  # type: ignore[method-assign]
    pipeline.stages[1].open = refuse  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="no"):
        await pipeline.open(num_blocks=1, max_slots=1)
    assert ended == ["cancelled"]


def test_reports_that_nobody_asked_for_are_a_fault_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_session, "MAX_UNASKED_REPORTS_A_MINUTE", 60)
    stage = StageSession(shard("shard:0"), NoListener(), FrameCounter())  # type: ignore[arg-type]
    stage.take_load = lambda report: None  # type: ignore[method-assign]
    began_s = stage._unasked_reports._filled_at_s
    for second in range(100):  # one a second, and five at once now and then
        for _ in range(5 if second % 10 == 0 else 1):
            stage._count_report(began_s + second)
    report = write_frame(pb.SessionResponse(load=pb.LoadReport()))
    stage._unasked_reports.take(100, began_s)
    with pytest.raises(ShardFault) as caught:
        stage._take(report)
    assert (caught.value.field, caught.value.limit, caught.value.addresses) == ("load", "60", ("shard:0",))


def test_as_many_reports_may_come_as_are_asked_for() -> None:
    stage = StageSession(shard("shard:0"), NoListener(), FrameCounter())  # type: ignore[arg-type]
    now_s = stage._unasked_reports._filled_at_s
    for _ in range(100 * stage_session.MAX_UNASKED_REPORTS_A_MINUTE):
        stage._unasked_reports.take(-1, now_s)
        stage._count_report(now_s)
