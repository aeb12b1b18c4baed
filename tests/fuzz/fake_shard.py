"""The shard's real service with a runner that computes nothing, and the two ends of a call."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import grpc
import grpc.aio
import numpy as np
import torch

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.leases.assignment import Assignment
from stagecoach_shard.leases.served_stage import ServedStage, StepLimits
from stagecoach_shard.leases.wire import DTYPES
from stagecoach_shard.rpc.service import ShardService
from stagecoach_shard.runtime.load_meter import LoadMeter, StepTimes
from stagecoach_shard.runtime.stage_runner import StageInput

LEASE_ID = 77
EPOCH = 3
NUM_BLOCKS = 8
BLOCK_SIZE = 4
MAX_SLOTS = 4
CONTEXT_LENGTH = 40
MAX_BATCH_TOKENS = 24
VOCAB_SIZE = 50
HIDDEN_SIZE = 6
FINGERPRINT = "f" * 64
WAIT_S = 10.0


class Aborted(Exception):
    """The call was ended with a status."""

    def __init__(self, code: grpc.StatusCode, error: errors.StagecoachError) -> None:
        super().__init__(f"{code.name}: {error!r}")
        self.code = code
        self.error = error


class FakeContext:
    """A call whose requests are given, then over; with `stays_open` only after `close`."""

    def __init__(self, *requests: Any, stays_open: bool = False) -> None:
        self._requests = list(requests)
        self._closed = asyncio.Event()
        self.answered = asyncio.Event()
        self.answers: list[Any] = []
        if not stays_open:
            self._closed.set()

    def close(self) -> None:
        self._closed.set()

    async def read(self) -> Any:
        if self._requests:
            return self._requests.pop(0)
        await self._closed.wait()
        return grpc.aio.EOF

    async def write(self, answer: Any) -> None:
        self.answers.append(answer)
        self.answered.set()

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> NoReturn:
        error = errors.from_trailing_metadata(trailing_metadata)
        assert error is not None
        assert details == error.message
        raise Aborted(code, error)


class CheckingRunner:
    """Checks what the service would have computed: everything that a stage uses without looking again."""

    def __init__(self, layers: LayerRange, num_layers: int) -> None:
        config = SimpleNamespace(
            family="llama",
            num_layers=num_layers,
            hidden_size=HIDDEN_SIZE,
            vocab_size=VOCAB_SIZE,
            context_length=CONTEXT_LENGTH,
        )
        self.stage: Any = SimpleNamespace(
            layers=layers,
            is_first=layers.start == 0,
            is_last=layers.end == num_layers,
            is_native=False,
            weights_bytes=1,
            dtype=torch.float32,
            config=config,
        )
        self.cache: Any = SimpleNamespace(num_blocks=NUM_BLOCKS, total_bytes=1)
        self.meter = LoadMeter()
        self.num_steps = 0

    def stop(self, timeout_s: float) -> bool:
        return True

    def submit(self, step: StageInput, on_done: Any, *, decode_s: float = 0.0) -> None:
        rows = step.batch
        assert rows.total_tokens <= MAX_BATCH_TOKENS
        assert int((rows.starts + rows.num_tokens).max()) <= CONTEXT_LENGTH
        blocks = rows.block_tables
        assert blocks.min() >= 0
        assert blocks.max() < NUM_BLOCKS
        assert np.all(-(-(rows.starts + rows.num_tokens) // BLOCK_SIZE) <= blocks.shape[1])
        shape = (rows.total_tokens,) if self.stage.is_first else (rows.total_tokens, HIDDEN_SIZE)
        assert step.inputs.shape == shape
        if self.stage.is_first:
            assert 0 <= int(step.inputs.min()) <= int(step.inputs.max()) < VOCAB_SIZE
        for wanted in step.outputs:
            assert 0 <= int(wanted.token_indices.min()) <= int(wanted.token_indices.max()) < rows.total_tokens
            if wanted.temperatures is not None:
                assert bool(torch.isfinite(wanted.temperatures).all() and (wanted.temperatures >= 0).all())
        self.num_steps += 1
        on_done(None if not self.stage.is_last else [], StepTimes(decode_s, queue_s=0.0, compute_s=0.0))


def _no_dial(address: str) -> NoReturn:
    raise errors.Unavailable(f"{address}: no links here")


@dataclass(frozen=True, slots=True)
class FakeShard:
    """The service, and what is behind it. `loaded`: every runner that was ever loaded, in order."""

    service: ShardService
    assignment: Assignment
    loaded: list[CheckingRunner]

    @property
    def runner(self) -> CheckingRunner:
        return self.loaded[-1]

    @property
    def stage(self) -> ServedStage:
        return self.assignment.served()


def make_shard(layers: LayerRange | None, num_layers: int, *, assignable: bool = False) -> FakeShard:
    """A shard with `layers` of a model of so many; None: with none yet."""
    loaded: list[CheckingRunner] = []

    def load(layers: LayerRange) -> Any:
        loaded.append(CheckingRunner(layers, num_layers))
        return loaded[-1]

    checkpoint: Any = SimpleNamespace(
        name="m",
        fingerprint=FINGERPRINT,
        files_digest="",
        config=CheckingRunner(LayerRange(0, 1), num_layers).stage.config,
    )
    limits = StepLimits(BLOCK_SIZE, MAX_BATCH_TOKENS, max_queued_steps=4)
    assignment = Assignment(
        load, lambda runner: ServedStage(checkpoint, runner, limits), assignable=assignable, on_ready=lambda ready: None
    )
    if layers is not None:

        async def begin() -> None:
            await assignment.begin(layers)

        asyncio.run(begin())
    service = ShardService(
        checkpoint,
        assignment,
        device=torch.device("cpu"),
        dtype=torch.float32,
        limits=limits,
        process_id="u",
        dial=_no_dial,
    )
    return FakeShard(service, assignment, loaded)


def first_and_last(*, assignable: bool = False) -> FakeShard:
    """A shard with the whole model."""
    return make_shard(LayerRange(0, 2), 2, assignable=assignable)


def in_the_middle() -> FakeShard:
    """A shard with layers before and after its own."""
    return make_shard(LayerRange(2, 4), 6)


def open_request(stage: Any, **changes: Any) -> pb.SessionRequest:
    """What opens a lease on that stage."""
    facts: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": FINGERPRINT,
        "layers": model_pb2.LayerRange(start=stage.layers.start, end=stage.layers.end),
        "dtype": DTYPES[stage.dtype],
        "lease_id": LEASE_ID,
        "epoch": EPOCH,
        "num_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_slots": MAX_SLOTS,
    }
    return pb.SessionRequest(open=pb.OpenRequest(**(facts | changes)))
