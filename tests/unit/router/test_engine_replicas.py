"""Which of several pipelines computes a request, and where it goes on when that one breaks. No network."""

from __future__ import annotations

import asyncio

import pytest

from stagecoach.errors import DeadlineExceeded, OutOfRange, Overloaded, ShardFault
from stagecoach_router.engine import engine
from stagecoach_router.engine.poison_detector import MAX_LOSSES_ALONE
from stagecoach_router.sampling.outputs import Sampled
from tests.unit.router.fake_pipelines import TOKEN, FakeCluster, FakePipeline, request

LONG = 40


async def two(**settings):
    pipelines = FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines, **settings)
    replicas = [await cluster.open(answered=True), await cluster.open(answered=True)]
    return cluster, pipelines, replicas


def tokens_of(state):
    return [delta.token_id for delta in state.read_from(0)]


async def test_requests_spread_over_the_pipelines():
    cluster, _, replicas = await two()
    for number in range(6):
        cluster.submit(request(str(number)))
    assert [replica.num_sequences for replica in replicas] == [3, 3]


async def test_a_known_prefix_decides_between_pipelines_that_are_about_as_busy():
    cluster, pipelines, _ = await two()
    num_cached = []
    for _ in range(3):
        state = cluster.submit(request("the same", num_prompt=40))
        pipelines[0].answer_all()
        assert state.ended
        num_cached.append(state.sequences[0].num_cached)
    assert num_cached == [0, 32, 32]


async def test_what_a_lost_pipeline_computed_goes_on_at_once_where_it_stopped():
    cluster, pipelines, replicas = await two()
    state = cluster.submit(request("a", max_tokens=6))
    home, other = (0, 1) if replicas[0].num_sequences else (1, 0)
    for _ in range(3):
        pipelines[home].answer(TOKEN)
    pipelines[home].break_down()
    assert cluster.engine.ready, "the other one serves"
    assert replicas[home].num_sequences == 0
    [header] = pipelines[other].sent
    assert list(header.row_num_tokens) == [3 + 3], "the prompt and what was generated, in one prefill"
    pipelines[other].answer_all()
    assert tokens_of(state) == [TOKEN] * 6
    assert all(replica.scheduler.blocks.num_free == replica.scheduler.blocks.num_blocks for replica in replicas)


async def test_late_results_of_the_lost_pipeline_change_nothing():
    cluster, pipelines, replicas = await two()
    state = cluster.submit(request("a", max_tokens=4))
    home = 0 if replicas[0].num_sequences else 1
    plan = next(iter(replicas[home].scheduler._in_flight))
    pipelines[home].break_down()
    assert replicas[home].scheduler.complete(plan) == []
    pipelines[1 - home].answer_all()
    assert tokens_of(state) == [TOKEN] * 4


async def test_all_completions_of_a_request_move_together():
    cluster, pipelines, replicas = await two()
    state = cluster.submit(request("a", n=3, max_tokens=5, num_prompt=20))
    home = 0 if replicas[0].num_sequences else 1
    pipelines[home].answer()
    pipelines[home].break_down()
    assert replicas[1 - home].num_sequences == 3
    pipelines[1 - home].answer_all()
    assert [completion.num_tokens for completion in state.completions] == [5, 5, 5]


async def test_where_no_pipeline_is_left_requests_wait_and_the_first_one_back_takes_them_all():
    cluster, pipelines, replicas = await two()
    states = [cluster.submit(request(str(number), max_tokens=3)) for number in range(4)]
    for pipeline in pipelines:
        pipeline.break_down()
    assert cluster.readiness == [True, False]
    late = cluster.submit(request("late", max_tokens=3))
    await replicas[1].open()
    assert not cluster.engine.ready
    pipelines[1].answer_all()
    assert [tokens_of(each) for each in [*states, late]] == [[TOKEN] * 3] * 5
    assert cluster.readiness == [True, False, True]


async def test_what_fits_only_the_lost_pipeline_waits_for_it():
    pipelines = FakePipeline(num_blocks=8), FakePipeline(num_blocks=2)
    cluster = FakeCluster(*pipelines)
    large, small = await cluster.open(answered=True), await cluster.open(answered=True)
    long_one = cluster.submit(request("long", num_prompt=LONG, max_tokens=LONG))
    assert large.num_sequences == 1
    with pytest.raises(OutOfRange):
        cluster.submit(request("too long", num_prompt=LONG, max_tokens=100))
    pipelines[0].break_down()
    assert (large.num_sequences, small.num_sequences) == (1, 0)
    await large.open()
    pipelines[0].answer_all()
    assert tokens_of(long_one) == [TOKEN] * LONG


async def test_a_newcomer_takes_its_share_of_those_that_wait_the_last_ones_first():
    pipelines = FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines, max_running=2)
    first = await cluster.open(answered=True)
    states = [cluster.submit(request(str(number), max_tokens=5)) for number in range(6)]
    second = await cluster.open()
    assert second.num_sequences == 0, "nothing has come through it yet"
    pipelines[1].answer()
    assert (first.num_sequences, second.num_sequences) == (3, 3)
    assert first.requests == states[:3]
    for pipeline in pipelines:
        pipeline.answer_all()
    assert [tokens_of(each) for each in states] == [[TOKEN] * 5] * 6


async def test_a_moved_request_keeps_its_deadline():
    cluster, pipelines, replicas = await two()
    state = cluster.submit(request("a"))
    cluster.engine.set_deadline(state, 0.0 + 1e12)
    home = 0 if replicas[0].num_sequences else 1
    pipelines[home].break_down()
    assert [replica.scheduler.next_deadline_s for replica in (replicas[home], replicas[1 - home])] == [None, 1e12]
    cluster.engine.set_deadline(state, 0.0)
    with pytest.raises(DeadlineExceeded):
        state.read_from(0)
    await_no_timer(cluster)


def await_no_timer(cluster):
    assert all(replica.scheduler.next_deadline_s is None for replica in cluster.engine.replicas)


async def test_what_was_under_way_at_two_losses_in_a_row_does_not_break_a_third_pipeline():
    pipelines = FakePipeline(), FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines)
    replicas = [await cluster.open(answered=True) for _ in pipelines]
    poison = cluster.submit(request("poison"))
    waiting_elsewhere = cluster.submit(request("other", max_tokens=2))
    assert [replica.num_sequences for replica in replicas] == [1, 1, 0]
    pipelines[0].break_down()
    assert [replica.num_sequences for replica in replicas] == [0, 1, 1]
    pipelines[2].break_down()
    assert [replica.num_sequences for replica in replicas] == [0, 1, 1], "it waits for the one it may have broken"
    pipelines[1].answer_all()
    assert tokens_of(waiting_elsewhere) == [TOKEN] * 2
    for _ in range(MAX_LOSSES_ALONE - 1):
        await replicas[2].open()
        pipelines[2].answer()
        pipelines[2].break_down()
    with pytest.raises(ShardFault, match="lost 4 times"):
        poison.read_from(0)


async def test_a_suspect_moves_when_its_own_pipeline_does_not_come_back(monkeypatch):
    pipelines = FakePipeline(), FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines)
    replicas = [await cluster.open(answered=True) for _ in pipelines]
    state = cluster.submit(request("a", max_tokens=3))
    pipelines[0].break_down()
    pipelines[1].break_down()
    assert [replica.num_sequences for replica in replicas] == [0, 1, 0]
    monkeypatch.setattr(engine, "POISON_PATIENCE_S", 0.0)
    cluster.engine.replica_changed(replicas[1])  # as after an attempt that failed
    assert [replica.num_sequences for replica in replicas] == [0, 0, 1]
    pipelines[2].answer_all()
    assert tokens_of(state) == [TOKEN] * 3


async def test_a_token_of_the_replay_alone_is_no_progress():
    """A request whose prefill is computed and whose decode breaks the pipeline must end, too."""
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open(answered=True)
    poison = cluster.submit(request("poison", max_tokens=30))
    for _ in range(MAX_LOSSES_ALONE + 1):
        pipeline.answer()  # its prefill; the decode is under way now
        pipeline.break_down()
        await replica.open()
        pipeline.answer()  # the probe
    assert isinstance(poison.error, ShardFault)


async def test_two_tokens_after_a_replay_are_progress():
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open(answered=True)
    state = cluster.submit(request("a", max_tokens=30))
    for _ in range(10):
        for _ in range(2):
            pipeline.answer()
        pipeline.break_down()
        await replica.open()
        pipeline.answer()
    pipeline.answer_all()
    assert tokens_of(state) == [TOKEN] * 30


async def test_what_a_former_router_accepted_is_not_refused_for_want_of_room():
    cluster, pipelines, _ = await two(max_running=1, max_waiting=0)
    for number in range(2):
        cluster.submit(request(str(number), max_tokens=2))
    with pytest.raises(Overloaded):
        cluster.submit(request("new", max_tokens=2))
    resumed = [cluster.submit(request(f"old {number}", max_tokens=2), [[]]) for number in range(3)]
    for _ in range(3):
        for pipeline in pipelines:
            pipeline.answer_all()
    assert [tokens_of(each) for each in resumed] == [[TOKEN] * 2] * 3


async def test_the_line_is_bounded_at_the_door_but_never_for_what_was_accepted():
    cluster, pipelines, replicas = await two(max_running=1, max_waiting=2)
    accepted = [cluster.submit(request(str(number), max_tokens=3)) for number in range(6)]
    with pytest.raises(Overloaded):
        cluster.submit(request("one too many"))
    pipelines[0].break_down()
    assert replicas[1].num_sequences == 6
    pipelines[1].answer_all()
    assert [tokens_of(each) for each in accepted] == [[TOKEN] * 3] * 6


async def test_cancelling_reaches_a_request_wherever_it_is():
    cluster, pipelines, replicas = await two()
    state = cluster.submit(request("a"))
    home = 0 if replicas[0].num_sequences else 1
    pipelines[home].break_down()
    cluster.engine.cancel(state)
    pipelines[1 - home].answer_all()
    assert [replica.num_sequences for replica in replicas] == [0, 0]
    assert replicas[1 - home].scheduler.blocks.num_free == 8


async def test_requests_that_name_no_limit_fit_pipelines_that_differ_a_little():
    pipelines = FakePipeline(num_blocks=8), FakePipeline(num_blocks=7), FakePipeline(num_blocks=2)
    cluster = FakeCluster(*pipelines)
    for _ in pipelines:
        await cluster.open(answered=True)
    assert cluster.engine.usual_capacity_tokens(3) == 7 * 16
    assert cluster.engine.usual_capacity_tokens(7 * 16) == 8 * 16
    assert cluster.engine.usual_capacity_tokens(9 * 16) == 8 * 16, "who asks for that is told what there is"


async def test_what_finished_in_a_former_process_has_no_place_in_line():
    """As when a journal has a request of two completions, of which the first was finished."""
    pipelines = FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines, max_running=1)
    await cluster.open(answered=True)
    cluster.submit(request("runs", max_tokens=4))
    done = [Sampled(TOKEN, None, ())] * 2
    resumed = cluster.submit(request("resumed", max_tokens=2, n=2), [done, []])
    others = [cluster.submit(request(str(number), max_tokens=2)) for number in range(3)]
    await cluster.open(answered=True)
    for pipeline in pipelines:
        pipeline.answer_all()
    assert [each.ended for each in [resumed, *others]] == [True] * 4


async def test_a_new_request_waits_for_the_pipeline_that_was_lost_last():
    cluster, pipelines, replicas = await two()
    pipelines[0].break_down()
    await asyncio.sleep(0)
    pipelines[1].break_down()
    for number in range(2):
        cluster.submit(request(str(number)))
    assert [replica.num_sequences for replica in replicas] == [0, 2]


async def test_an_open_pipeline_without_tokens_gives_its_requests_away_after_a_while(monkeypatch):
    pipelines = FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines)
    silent = await cluster.open()
    state = cluster.submit(request("a", max_tokens=3))
    other = await cluster.open(answered=True)
    assert silent.num_sequences == 1
    monkeypatch.setattr(engine, "UNPROVEN_PATIENCE_S", 0.0)
    silent._prove()
    assert (silent.num_sequences, other.num_sequences) == (0, 1)
    pipelines[1].answer_all()
    assert tokens_of(state) == [TOKEN] * 3
    pipelines[0].answer_all()
    assert silent.ready


async def test_a_pipeline_that_comes_back_smaller_leaves_what_does_not_fit_to_another():
    pipelines = FakePipeline(num_blocks=8), FakePipeline(num_blocks=8)
    cluster = FakeCluster(*pipelines)
    replicas = [await cluster.open(answered=True), await cluster.open(answered=True)]
    state = cluster.submit(request("long", num_prompt=LONG, max_tokens=LONG))
    for pipeline in pipelines:
        pipeline.break_down()
    home = next(index for index, replica in enumerate(replicas) if replica.num_sequences)
    pipelines[home].num_blocks = 2
    await replicas[home].open()
    assert replicas[1 - home].num_sequences == 1
    await replicas[1 - home].open()
    pipelines[1 - home].answer_all()
    assert tokens_of(state) == [TOKEN] * LONG


async def test_nobody_is_refused_while_one_pipeline_has_room():
    """The one with the prefix would be chosen, or the faster one, but its line is full."""
    pipelines = FakePipeline(num_blocks=40), FakePipeline(num_blocks=40)
    cluster = FakeCluster(*pipelines, max_running=1, max_waiting=3)
    first = await cluster.open(answered=True)
    known = cluster.submit(request("known", num_prompt=40, max_tokens=1))
    pipelines[0].answer_all()
    assert known.ended
    for number in range(4):
        cluster.submit(request(str(number), max_tokens=3))
    second = await cluster.open(answered=True)
    cluster.engine.check_room(1)
    for _ in range(4):
        cluster.submit(request("known", num_prompt=40, max_tokens=3))
    assert (first.num_sequences, second.num_sequences) == (4, 4)
    with pytest.raises(Overloaded):
        cluster.engine.check_room(1)
    with pytest.raises(Overloaded):
        cluster.submit(request("one too many"))


async def test_all_completions_find_room_or_another_pipeline_takes_them():
    pipelines = FakePipeline(num_blocks=40), FakePipeline(num_blocks=40)
    cluster = FakeCluster(*pipelines, max_running=1, max_waiting=4)
    replicas = [await cluster.open(answered=True) for _ in pipelines]
    cluster.submit(request("a", num_prompt=40, max_tokens=2, n=3))
    pipelines[0].answer_all()
    cluster.submit(request("b", max_tokens=2, n=3))
    state = cluster.submit(request("a", num_prompt=40, max_tokens=2, n=3))
    assert [replica.num_sequences for replica in replicas] == [3, 3]
    for pipeline in pipelines:
        pipeline.answer_all()
    assert state.ended
