"""A request that breaks whatever computes it fails alone, and nobody fails because other things broke. No network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach.errors import DeadlineExceeded, InternalError, ShardFault
from stagecoach.rpc.framing import read_frame
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.engine import engine, step_loop
from stagecoach_router.engine.poison_detector import MAX_LOSSES_ALONE, MAX_LOSSES_WITHOUT
from tests.unit.router.fake_pipelines import FakeCluster, FakePipeline, request
from tests.unit.router.memory_pipeline import MemoryPipeline, expected_tokens

# To become a suspect, and then to be convicted, where nothing else breaks.
MOST_LOSSES = 2 + MAX_LOSSES_ALONE + 1


class PoisonedPipeline(MemoryPipeline):
    """Breaks with any step that has a row of a poison request.

    `is_poison` is asked with the tokens that a row is computed from. `wrong`: what comes back is nonsense, instead of
    nothing.
    """

    def __init__(self, is_poison: Callable[[list[int]], bool], *, wrong: bool = False, num_blocks: int = 40) -> None:
        super().__init__(num_blocks)
        self._is_poison = is_poison
        self._wrong = wrong

    async def connect(self, listener: Any) -> Any:
        self._broken: list[bool] = []
        return await super().connect(listener)

    def _compute(self, frame: bytes, expected_s: float | None) -> None:
        super()._compute(frame, expected_s)
        header = read_frame(pb.MicroBatch, frame)[0].header
        rows = zip(header.row_slots, header.row_starts, header.row_num_tokens, strict=True)
        self._broken.append(any(self._is_poison(self._read(slot, start + num - 1)) for slot, start, num in rows))

    def answer_one(self) -> bool:
        if not self.is_open or not self._results:
            return False
        if not self._broken.pop(0):
            return super().answer_one()
        if self._wrong:
            result, _ = self._results[0]
            with pytest.raises(ShardFault):
                self.listener.result_came(pb.StepResult(epoch=result.epoch, step=result.step, outputs=[{}] * 9), b"")
        self.break_down()
        return True


def begins_with(*requests):
    prompts = [list(each.prompt_tokens) for each in requests]
    return lambda tokens: any(tokens[: len(prompt)] == prompt for prompt in prompts)


async def until_all_end(cluster, pipelines, kill=lambda: False, most_steps=20_000):
    """Brings back what breaks, and lets steps come back, until nothing is left to do. `kill`: now something dies."""
    replicas = cluster.engine.replicas
    for _ in range(most_steps):
        if not any(replica.num_sequences for replica in replicas):
            return
        for replica, pipeline in zip(replicas, pipelines, strict=True):
            if not pipeline.is_open:
                await replica.open()
            elif kill():
                pipeline.break_down()
            else:
                pipeline.answer_one()
    raise AssertionError("they do not end")


def assert_finished(asked, state):
    assert state.error is None
    assert state.ended
    for sequence in state.sequences:
        assert sequence.output_tokens == expected_tokens(asked.prompt_tokens, asked.params.max_tokens)


async def break_with_suspects(pipeline, replica, states):
    """The pipeline breaks while all of these run, not for the first time, and comes back."""
    for state in states:
        for sequence in state.sequences:
            assert sequence.order is not None
            sequence.lost_pipeline(alone=False)
            sequence.lost_pipeline(alone=False)
    pipeline.break_down()
    await replica.open()


def eight(max_tokens=30):
    return [request(str(number), num_prompt=3 + 5 * number, max_tokens=max_tokens) for number in range(8)]


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("which", [0, 3, 7])
@pytest.mark.parametrize("from_token", [0, 1, 12])
async def test_one_among_eight_fails_alone(which, wrong, from_token):
    """Whether it breaks on its prompt, on its first decode or later, and whether a shard dies or sends nonsense."""
    asked = eight()
    prompt = list(asked[which].prompt_tokens)
    pipeline = PoisonedPipeline(
        lambda tokens: tokens[: len(prompt)] == prompt and len(tokens) >= len(prompt) + from_token, wrong=wrong
    )
    cluster = FakeCluster(pipeline, max_running=8)
    await cluster.open()
    states = [cluster.submit(each) for each in asked]
    await until_all_end(cluster, [pipeline])
    guilty = states.pop(which)
    assert isinstance(guilty.error, ShardFault)
    for each, state in zip([one for one in asked if one is not asked[which]], states, strict=True):
        assert_finished(each, state)
    assert pipeline.num_losses <= MOST_LOSSES


async def test_several_of_them_fail_and_nobody_else():
    asked = eight()
    pipeline = PoisonedPipeline(begins_with(asked[1], asked[2], asked[6]))
    cluster = FakeCluster(pipeline, max_running=8)
    await cluster.open()
    states = [cluster.submit(each) for each in asked]
    await until_all_end(cluster, [pipeline])
    assert [state.error is not None for state in states] == [number in (1, 2, 6) for number in range(8)]
    assert pipeline.num_losses <= 3 * MOST_LOSSES


async def test_one_of_many_completions_fails_with_its_request():
    asked = [request("n", n=8, max_tokens=10), request("other", max_tokens=40)]
    pipeline = PoisonedPipeline(begins_with(asked[0]))
    cluster = FakeCluster(pipeline, max_running=16)
    await cluster.open()
    poison, other = [cluster.submit(each) for each in asked]
    await until_all_end(cluster, [pipeline])
    assert isinstance(poison.error, ShardFault)
    assert_finished(asked[1], other)
    assert pipeline.num_losses <= MOST_LOSSES


@pytest.mark.parametrize("num_others", [0, 3])
async def test_of_two_pipelines_it_never_breaks_both_at_a_time_once_it_is_suspected(num_others):
    asked = [request("poison"), *eight()[:num_others]]
    pipelines = [PoisonedPipeline(begins_with(asked[0])) for _ in range(2)]
    cluster = FakeCluster(*pipelines, max_running=8)
    for _ in pipelines:
        await cluster.open()
    for pipeline in pipelines:
        pipeline.answer_one()
    states = [cluster.submit(each) for each in asked]
    await until_all_end(cluster, pipelines)
    assert isinstance(states[0].error, ShardFault)
    for each, state in zip(asked[1:], states[1:], strict=True):
        assert_finished(each, state)
    losses = sorted(pipeline.num_losses for pipeline in pipelines)
    assert losses[0] <= 1, "the first loss moved it, and then it stayed"
    assert sum(losses) <= MOST_LOSSES


async def test_a_newcomer_does_not_take_over_who_waits_for_its_trial():
    pipelines = FakePipeline(), FakePipeline()
    cluster = FakeCluster(*pipelines)
    replica = await cluster.open(answered=True)
    suspects = [cluster.submit(request(str(number))) for number in range(4)]
    await break_with_suspects(pipelines[0], replica, suspects)
    pipelines[0].answer()
    assert all(state.is_suspect for state in suspects)
    newcomer = await cluster.open(answered=True)
    assert (replica.num_sequences, newcomer.num_sequences) == (4, 0)
    pipelines[0].answer_all()
    assert all(state.ended and state.error is None for state in suspects)


async def test_suspects_are_computed_one_at_a_time_and_others_between_them():
    pipeline = MemoryPipeline(40)
    cluster = FakeCluster(pipeline, max_running=8)
    replica = await cluster.open()
    pipeline.answer_one()
    states = [cluster.submit(each) for each in eight(max_tokens=60)[:3]]
    await break_with_suspects(pipeline, replica, states)
    pipeline.answer_one()
    new = cluster.submit(request("new", max_tokens=100))
    was_alone = set()
    while any(state.is_suspect for state in states):
        under_way = list(replica._steps.under_way())
        suspects = [state for state in under_way if state.is_suspect]
        assert not suspects or len(under_way) == 1
        was_alone.update(suspects)
        pipeline.answer_one()
    assert was_alone == set(states)
    assert new.num_output_tokens >= 2, "it had its turns"
    while pipeline.answer_one():
        pass
    assert all(state.ended for state in [*states, new])


async def test_a_suspect_can_be_cancelled_or_time_out_while_it_is_on_trial_or_waits_for_it():
    pipeline = MemoryPipeline(40)
    cluster = FakeCluster(pipeline, max_running=8)
    replica = await cluster.open()
    pipeline.answer_one()
    asked = eight()[:5]
    states = [cluster.submit(each) for each in asked]
    await break_with_suspects(pipeline, replica, states)
    pipeline.answer_one()
    assert list(replica._steps.under_way()) == [states[0]]
    cluster.engine.cancel(states[0])
    cluster.engine.cancel(states[4])
    cluster.engine.set_deadline(states[1], 0.0)
    with pytest.raises(DeadlineExceeded):
        states[1].read_from(0)
    await until_all_end(cluster, [pipeline])
    for each, state in zip(asked[2:4], states[2:4], strict=True):
        assert_finished(each, state)


async def test_whose_pipeline_breaks_all_the_time_is_not_convicted_for_it():
    """One stream alone is under way at every loss; losses of others' steps speak for it."""
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open(answered=True)
    for _ in range(MAX_LOSSES_WITHOUT):
        pipeline.break_down()  # nobody's step was under way
        await replica.open()
        pipeline.answer()
    state = cluster.submit(request("a", max_tokens=3))
    for _ in range(MAX_LOSSES_ALONE + MAX_LOSSES_WITHOUT):
        pipeline.break_down()
        await replica.open()
        pipeline.answer()
    assert state.error is None
    pipeline.break_down()
    assert isinstance(state.error, ShardFault), "but not for ever"


async def test_nothing_of_a_request_is_sent_before_a_token_has_come():
    """A stage that breaks with whatever it is given breaks with the health probe, and nobody is suspected."""
    pipeline = FakePipeline()
    cluster = FakeCluster(pipeline)
    replica = await cluster.open()
    state = cluster.submit(request("a", max_tokens=2))
    for _ in range(20):
        assert len(pipeline.sent) == 1
        pipeline.break_down()
        await replica.open()
    assert not state.is_suspect
    pipeline.answer_all()
    assert state.ended


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_guilty=st.integers(0, 3), num_pipelines=st.integers(1, 2))
def test_whatever_dies_and_whoever_is_poison_exactly_those_fail(seed, num_guilty, num_pipelines):
    async def play():
        dice = Random(seed)
        asked = [
            request(
                str(number),
                num_prompt=dice.randint(1, 60),
                max_tokens=dice.randint(1, 40),
                n=dice.choice([1, 1, 1, 3]),
                priority=dice.choice([0, 0, 1]),
            )
            for number in range(8)
        ]
        guilty = asked[:num_guilty]
        pipelines = [PoisonedPipeline(begins_with(*guilty)) for _ in range(num_pipelines)]
        cluster = FakeCluster(*pipelines, max_running=dice.randint(2, 12), max_waiting=30)
        for _ in pipelines:
            await cluster.open()
        states = {}
        pending = dice.sample(asked, len(asked))

        def kill():
            if pending and dice.random() < 0.1:
                one = pending.pop()
                states[one.request_id] = cluster.submit(one)
            return dice.random() < 0.03

        while pending:
            one = pending.pop()
            states[one.request_id] = cluster.submit(one)
            await until_all_end(cluster, pipelines, kill)
        for one in asked:
            state = states[one.request_id]
            if one in guilty:
                assert isinstance(state.error, ShardFault)
            else:
                assert_finished(one, state)
        for replica in cluster.engine.replicas:
            assert replica.scheduler.blocks.num_free == replica.scheduler.blocks.num_blocks

    asyncio.run(play())


# ---- what goes wrong here, and not on a shard


class FailingText:
    """A tokenizer that cannot spell what follows one prompt."""

    eos_token_ids = ()

    def __init__(self, prompt):
        self._prompt = list(prompt)

    def prompt_tail(self, prompt):
        return prompt

    def detokenizer(self, prompt):
        def feed(token):
            if list(prompt) == self._prompt:
                raise ValueError("no such character")
            return ""

        return SimpleNamespace(feed=feed, flush=lambda: "")


async def test_who_cannot_be_detokenized_fails_alone_and_the_pipeline_lives(caplog):
    asked = eight()
    pipeline = MemoryPipeline(40)
    cluster = FakeCluster(pipeline, max_running=8)
    cluster.engine._tokenizer = FailingText(asked[2].prompt_tokens)
    await cluster.open()
    states = [cluster.submit(each) for each in asked]
    await until_all_end(cluster, [pipeline])
    assert isinstance(states.pop(2).error, InternalError)
    assert "no such character" in caplog.text, "with its traceback"
    for each, state in zip([*asked[:2], *asked[3:]], states, strict=True):
        assert_finished(each, state)
    assert pipeline.num_losses == 0


async def test_who_cannot_be_sampled_fails_alone_and_the_pipeline_lives(monkeypatch, caplog):
    asked = eight()
    choose_tokens = step_loop.choose_tokens

    def fail_for_one(outputs, sequences):
        if any(sequence.prompt_tokens == asked[2].prompt_tokens for sequence in sequences):
            raise ZeroDivisionError("no weights")
        return choose_tokens(outputs, sequences)

    monkeypatch.setattr(step_loop, "choose_tokens", fail_for_one)
    pipeline = MemoryPipeline(40)
    cluster = FakeCluster(pipeline, max_running=8)
    await cluster.open()
    states = [cluster.submit(each) for each in asked]
    await until_all_end(cluster, [pipeline])
    assert isinstance(states.pop(2).error, InternalError)
    for each, state in zip([*asked[:2], *asked[3:]], states, strict=True):
        assert_finished(each, state)
    assert pipeline.num_losses == 0
    assert "no weights" in caplog.text


async def test_a_suspect_whose_pipeline_does_not_come_back_is_tried_elsewhere(monkeypatch):
    asked = [request("poison", max_tokens=30), *eight()[:3]]
    pipelines = [PoisonedPipeline(begins_with(asked[0])) for _ in range(2)]
    cluster = FakeCluster(*pipelines, max_running=8)
    replicas = [await cluster.open() for _ in pipelines]
    for pipeline in pipelines:
        pipeline.answer_one()
    states = [cluster.submit(each) for each in asked]
    for _ in range(200):
        for pipeline in pipelines:
            pipeline.answer_one()
    home = next(index for index, replica in enumerate(replicas) if states[0] in replica.requests)
    assert states[0].is_suspect
    monkeypatch.setattr(engine, "POISON_PATIENCE_S", 0.0)
    other = 1 - home
    while states[0].error is None:
        if not pipelines[other].is_open:
            await replicas[other].open()
        elif not pipelines[other].answer_one():
            break
    assert isinstance(states[0].error, ShardFault)
