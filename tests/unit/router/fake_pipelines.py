"""An engine over pipelines of no network, that answer, break and come back when told to."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np

from stagecoach.errors import StagecoachError, Unavailable
from stagecoach.rpc.framing import read_frame
from stagecoach.sampling_params import SamplingParams
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.engine.engine import Engine
from stagecoach_router.engine.health_probe import HealthProbe
from stagecoach_router.engine.replica import Replica, ReplicaSettings
from stagecoach_router.requests.request import Request
from stagecoach_router.requests.request_state import RequestState
from stagecoach_router.sampling.outputs import Sampled
from stagecoach_router.scheduling.block_manager import BlockManager
from stagecoach_router.scheduling.scheduler import Scheduler

VOCAB_SIZE = 1000
TOKEN = 5
BLOCK_SIZE = 16


class NoText:
    """A tokenizer without texts."""

    eos_token_ids = ()

    def prompt_tail(self, _: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def detokenizer(self, _: Sequence[int]) -> Any:
        return SimpleNamespace(feed=lambda token: "", flush=lambda: "")


class FakePipeline:
    """What one replica is connected to, with `num_blocks` for requests. Epochs are of its own."""

    def __init__(self, num_blocks: int = 8) -> None:
        self.num_blocks = num_blocks
        self.sent: list[pb.MicroBatchHeader] = []
        self.epoch = 0
        self.max_batch_tokens = 64

    async def connect(self, listener: Any) -> Any:
        self.listener = listener
        self.epoch += 1
        self.sent.clear()
        self._open = SimpleNamespace(
            lost=None,
            stages=[None, None],
            vocab_size=VOCAB_SIZE,
            num_blocks=self.num_blocks + 1,
            max_batch_tokens=self.max_batch_tokens,
            max_queued_steps=4,
            lease_id=1,
            epoch=self.epoch,
            send=self._send,
            give_up=self._lose,
            close=self._close,
        )
        return self._open

    async def _close(self) -> None:
        self._open.lost = self._open.lost or Unavailable("closed")

    def _send(self, frame: bytes, expected_s: float | None) -> None:
        message, _ = read_frame(pb.MicroBatch, frame)
        self.sent.append(message.header)

    def answer(self, token: int = TOKEN) -> None:
        """The oldest step comes back, with the same token for every row that wants one."""
        header = self.sent.pop(0)
        result = pb.StepResult(epoch=header.epoch, step=header.step)
        payload = b""
        for group in header.outputs:
            rows = len(group.token_indices)
            result.outputs.add(num_rows=rows, num_columns=1, candidates=True, dtype=1)
            payload += np.full(rows, token, "<i4").tobytes() + np.ones(rows, "<f4").tobytes()
        self.listener.result_came(result, memoryview(payload))

    def answer_all(self, most: int = 1000) -> None:
        """Until nothing is under way."""
        for _ in range(most):
            if not self.sent:
                return
            self.answer()
        raise AssertionError(f"more than {most} steps")

    def break_down(self, error: StagecoachError | None = None) -> None:
        self._lose(error or Unavailable("gone"))

    def _lose(self, error: StagecoachError) -> None:
        self._open.lost = error
        self.listener.pipeline_lost(error)


class FakeCluster:
    """An engine and its pipelines, of which `open` opens the next."""

    def __init__(self, *pipelines: FakePipeline, max_running: int = 4, max_waiting: int = 9) -> None:
        self.pipelines = pipelines
        self.readiness: list[bool] = []
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._not_open = list(pipelines)
        self.engine = Engine(
            NoText(),  # type: ignore[arg-type]
            vocab_size=VOCAB_SIZE,
            make_replica=self._make_replica,
            on_ready=self.readiness.append,
        )

    async def open(self, *, answered: bool = False) -> Replica:
        """Opens one more; `answered`: its probe's token has come."""
        pipeline = self._not_open[0]
        replica = await self.engine.open_replica()
        if answered:
            pipeline.answer()
        return replica

    def submit(self, request: Request, past: Sequence[Sequence[Sampled]] = ()) -> RequestState:
        """A request comes, or comes back from a journal."""
        state = RequestState(request)
        self.engine.submit(state, past)
        return state

    def _make_replica(self, owner: Any) -> Replica:
        scheduler = Scheduler(
            BlockManager(1, BLOCK_SIZE),
            max_batch_tokens=64,
            max_running=self._max_running,
            max_waiting=self._max_waiting,
            context_length=256,
        )
        return Replica(
            scheduler,
            ReplicaSettings(max_batch_tokens=64, recovery_timeout_s=60.0, straggler_window_s=2.5),
            connect=self._not_open.pop(0).connect,
            probe=HealthProbe(1.0, slot=self._max_running, vocab_size=VOCAB_SIZE),
            owner=owner,
        )


def request(
    name: str, *, num_prompt: int = 3, max_tokens: int = 20, n: int = 1, priority: int = 0, names_limit: bool = True
) -> Request:
    prompt = tuple(crc32(f"{name} {index}".encode()) % VOCAB_SIZE for index in range(num_prompt))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, n=n, seed=1)
    return Request(name, prompt, params, priority, names_limit=names_limit)
