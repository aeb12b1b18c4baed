"""What the engine makes of a pipeline that breaks, and when it says that it is ready: with a pipeline of no network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stagecoach.errors import ShardFault, Unavailable
from stagecoach.framing import read_frame
from stagecoach.sampling import SamplingParams
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.canary import Canary
from stagecoach_router.engine import Engine
from stagecoach_router.kv_blocks import BlockManager
from stagecoach_router.request import Request
from stagecoach_router.scheduler import Scheduler

VOCAB_SIZE = 1000
TOKEN = 5


class NoText:
    """A tokenizer without texts."""

    eos_token_ids = ()

    def detokenizer(self, _: list[int]) -> Any:
        return SimpleNamespace(feed=lambda token: "", flush=lambda: "")


class Cluster:
    """An engine over a pipeline that answers, or breaks, when told to."""

    def __init__(self, *, max_running: int = 4) -> None:
        self.readiness: list[bool] = []
        self.sent: list[pb.MicroBatchHeader] = []
        self.engine = Engine(
            Scheduler(
                BlockManager(1, 16), max_batch_tokens=64, max_running=max_running, max_waiting=9, context_length=256
            ),
            NoText(),  # type: ignore[arg-type]
            vocab_size=VOCAB_SIZE,
            connect=self._connect,
            on_ready=self.readiness.append,
            canary=Canary(1.0, slot=max_running, vocab_size=VOCAB_SIZE),
            max_batch_tokens=64,
            recovery_timeout_s=60.0,
        )

    async def _connect(self, epoch: int, on_result: Any, on_lost: Any) -> Any:
        self.on_result, self.on_lost = on_result, on_lost
        self.sent.clear()
        return SimpleNamespace(
            lost=None, num_blocks=9, max_batch_tokens=64, max_queued_steps=4, lease_id=1, epoch=epoch, send=self._send
        )

    def _send(self, frame: bytes, expected_s: float | None) -> None:
        message, _ = read_frame(pb.MicroBatch, frame)
        self.sent.append(message.header)

    def answer(self) -> None:
        """The oldest step comes back, with the same token for every row that wants one."""
        header = self.sent.pop(0)
        result = pb.StepResult(epoch=header.epoch, step=header.step)
        payload = b""
        for group in header.outputs:
            rows = len(group.token_indices)
            result.outputs.add(num_rows=rows, num_columns=1, candidates=True, dtype=1)
            payload += np.full(rows, TOKEN, "<i4").tobytes() + np.ones(rows, "<f4").tobytes()
        self.on_result(result, memoryview(payload))

    def break_down(self) -> None:
        self.on_lost(Unavailable("gone"))


def request(name: str) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=20))


async def test_it_is_ready_when_a_token_has_come_and_not_before():
    cluster = Cluster()
    await cluster.engine.open()
    assert not cluster.engine.ready
    cluster.answer()
    assert cluster.engine.ready
    cluster.break_down()
    assert not cluster.engine.ready
    await cluster.engine.open()
    cluster.answer()
    assert cluster.readiness == [True, False, True]


async def test_a_canary_counts_nowhere_and_has_a_slot_and_a_block_that_no_request_gets():
    cluster = Cluster()
    await cluster.engine.open()
    [header] = cluster.sent
    assert list(header.row_slots) == [4]
    assert [list(delta.block_ids) for delta in header.deltas] == [[8]]
    cluster.answer()
    assert cluster.engine.scheduler.blocks.num_blocks == 8
    counters = cluster.engine.counters
    assert (counters.num_finished, counters.prompt_tokens, counters.completion_tokens) == (0, 0, 0)
    assert cluster.engine.scheduler.num_running == 0


async def test_a_canary_without_a_number_is_an_error():
    cluster = Cluster()
    await cluster.engine.open()
    header = cluster.sent.pop(0)
    result = pb.StepResult(epoch=header.epoch, step=header.step)
    result.outputs.add(num_rows=1, num_columns=1, candidates=True, dtype=1)
    with pytest.raises(ShardFault):
        cluster.on_result(result, memoryview(np.array([TOKEN], "<i4").tobytes() + np.array([np.nan], "<f4").tobytes()))
    assert not cluster.engine.ready


async def test_who_had_a_step_under_way_at_each_loss_is_given_up_and_who_waited_is_not():
    cluster = Cluster(max_running=1)
    await cluster.engine.open()
    cluster.answer()
    running, waiting = cluster.engine.submit(request("a")), cluster.engine.submit(request("b"))
    for _ in range(4):
        assert any(list(header.row_slots) == [0] for header in cluster.sent)
        cluster.break_down()
        await cluster.engine.open()
    with pytest.raises(ShardFault, match="lost 4 times"):
        running.pieces.read_from(0)
    for _ in range(2):  # the canary, and the prompt
        cluster.answer()
    [piece] = waiting.pieces.read_from(0)
    assert piece.token_id == TOKEN


async def test_losses_while_nothing_of_it_is_under_way_do_not_count():
    """As when a shard stands still, comes back, and stands still again before anything was dispatched."""
    cluster = Cluster()
    await cluster.engine.open()
    generation = cluster.engine.submit(request("a"))
    cluster.break_down()
    for _ in range(20):
        cluster.break_down()  # no open has succeeded in between
    await cluster.engine.open()
    for _ in range(2):
        cluster.answer()
    [piece] = generation.pieces.read_from(0)
    assert piece.token_id == TOKEN
