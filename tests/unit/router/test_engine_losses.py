"""What becomes of requests whose pipeline breaks, and when it is said to be ready: with a pipeline of no network."""

from __future__ import annotations

import numpy as np
import pytest

from stagecoach.errors import ShardFault, ShardStopping, Unavailable
from stagecoach.v1 import shard_pb2 as pb
from tests.unit.router.fake_pipelines import TOKEN, FakeCluster, FakePipeline, request


async def test_it_is_ready_when_a_token_has_come_and_not_before():
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open()
    assert not cluster.engine.ready
    pipeline.answer()
    assert cluster.engine.ready
    pipeline.break_down()
    assert not cluster.engine.ready
    await replica.open()
    pipeline.answer()
    assert cluster.readiness == [True, False, True]


async def test_a_health_probe_counts_nowhere_and_has_a_slot_and_a_block_that_no_request_gets():
    pipeline = FakePipeline(num_blocks=8)
    cluster = FakeCluster(pipeline)
    replica = await cluster.open()
    [header] = pipeline.sent
    assert list(header.row_slots) == [4]
    assert [list(update.block_ids) for update in header.block_table_updates] == [[8]]
    pipeline.answer()
    assert replica.scheduler.blocks.num_blocks == 8
    counters = cluster.engine.counters
    assert (counters.num_finished, counters.prompt_tokens, counters.completion_tokens) == (0, 0, 0)
    assert replica.scheduler.num_running == 0


async def test_a_health_probe_without_a_number_is_an_error():
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    await cluster.open()
    header = pipeline.sent.pop(0)
    result = pb.StepResult(epoch=header.epoch, step=header.step)
    result.outputs.add(num_rows=1, num_columns=1, candidates=True, dtype=1)
    payload = np.array([TOKEN], "<i4").tobytes() + np.array([np.nan], "<f4").tobytes()
    with pytest.raises(ShardFault):
        pipeline.listener.result_came(result, memoryview(payload))
    assert not cluster.engine.ready


async def test_who_had_a_step_under_way_at_each_loss_is_given_up_and_who_waited_is_not():
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline, max_running=1)
    replica = await cluster.open(answered=True)
    running, waiting = cluster.submit(request("a")), cluster.submit(request("b"))
    for _ in range(4):
        assert any(list(header.row_slots) == [0] for header in pipeline.sent)
        pipeline.break_down()
        await replica.open()
        pipeline.answer()  # the health probe
    with pytest.raises(ShardFault, match="lost 4 times"):
        running.read_from(0)
    pipeline.answer()  # the prompt
    [delta] = waiting.read_from(0)
    assert delta.token_id == TOKEN


async def test_shards_that_are_told_to_stop_speak_against_nobody():
    """As in a rolling restart, in the middle of a prompt that takes longer than the restart of a stage."""
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open(answered=True)
    state = cluster.submit(request("a"))
    for _ in range(20):
        assert any(list(header.row_slots) == [0] for header in pipeline.sent)
        pipeline.break_down(ShardStopping("the shard is stopping"))
        await replica.open()
        pipeline.answer()  # the health probe
    for _ in range(4):  # nor for anybody: these are as many as convict where nothing else breaks
        assert state.error is None
        pipeline.break_down()
        await replica.open()
        pipeline.answer()
    with pytest.raises(ShardFault, match="lost 4 times"):
        state.read_from(0)


async def test_losses_while_nothing_of_it_is_under_way_do_not_count():
    """As when a shard stands still, comes back, and stands still again before anything was dispatched."""
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open(answered=True)
    state = cluster.submit(request("a"))
    pipeline.break_down()
    for _ in range(20):
        pipeline.break_down()  # no open has succeeded in between
    await replica.open()
    for _ in range(2):
        pipeline.answer()
    [delta] = state.read_from(0)
    assert delta.token_id == TOKEN


async def test_a_pipeline_that_breaks_before_it_is_handed_over_is_lost():
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    connect = pipeline.connect

    async def connect_and_break(listener):
        opened = await connect(listener)
        pipeline.break_down()
        return opened

    pipeline.connect = connect_and_break
    replica = await cluster.open()
    assert not replica.is_open
    assert pipeline.sent == []
    state = cluster.submit(request("a"))
    pipeline.connect = connect
    replica._connect = connect
    await replica.open()
    pipeline.answer_all()
    assert state.ended


async def test_steps_that_have_to_be_smaller_than_asked_for_are_warned_of_once(caplog):
    pipeline = FakePipeline()
    pipeline.max_batch_tokens = 16
    replica = await FakeCluster(pipeline).open()
    assert replica.scheduler.max_batch_tokens == 16
    pipeline.break_down()
    await replica.open()
    warnings = [record.getMessage() for record in caplog.records if "max-batch-tokens" in record.getMessage()]
    assert warnings == ["max-batch-tokens: 64; a step has 16 at most, as the shards and their messages take no more"]


async def test_while_everything_is_failed_nothing_new_is_sent():
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline, max_running=1)
    replica = await cluster.open(answered=True)
    states = [cluster.submit(request(str(number))) for number in range(3)]
    num_sent = len(pipeline.sent)
    replica.fail_all(Unavailable("the router is stopping"))
    assert len(pipeline.sent) == num_sent
    assert all(isinstance(state.error, Unavailable) for state in states)


async def test_who_fails_while_tokens_are_taken_sends_no_half_filled_step():
    """The place of the one that fails goes to who waits, in one step with those whose tokens are taken after it."""
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline, max_running=4)
    await cluster.open(answered=True)
    states = [cluster.submit(request(str(number), max_tokens=100)) for number in range(4)]
    for _ in range(12):
        pipeline.answer()
    waiting = cluster.submit(request("waiting"))
    assert not waiting.sequences[0].num_computed
    header = pipeline.sent.pop(0)
    [group] = header.outputs
    num_rows = len(group.token_indices)
    assert num_rows >= 2
    result = pb.StepResult(epoch=header.epoch, step=header.step)
    result.outputs.add(num_rows=num_rows, num_columns=1, candidates=True, dtype=1)
    logits = np.ones(num_rows, "<f4")
    logits[0] = np.nan
    num_sent = len(pipeline.sent)
    pipeline.listener.result_came(result, memoryview(np.full(num_rows, TOKEN, "<i4").tobytes() + logits.tobytes()))
    assert [isinstance(state.error, ShardFault) for state in states].count(True) == 1
    [sent] = pipeline.sent[num_sent:]
    assert len(sent.row_slots) == num_rows, "the others' decodes, and the prompt that waited"
    assert 3 in sent.row_num_tokens
