"""What a shard reads: frames, micro-batches on a Forward stream, requests on a Session stream."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import torch
from google.protobuf.message import DecodeError, Message

from stagecoach import PROTOCOL_VERSION, errors
from stagecoach.rpc.framing import read_frame, write_frame
from stagecoach.v1 import model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.leases.lease import Lease
from stagecoach_shard.leases.session import LeaseSession
from stagecoach_shard.rpc.forward_stream import read_step
from tests.fuzz import fake_shard
from tests.fuzz.engine import Target
from tests.fuzz.mutation import varint

# Tags of fields that exist, tags with length lies, groups, and numbers that go on and on.
PROTOBUF_WORDS = (
    *(bytes([number << 3 | wire_type]) for number in (1, 2, 3, 4, 7, 8, 15) for wire_type in (0, 1, 2, 3, 4, 5)),
    b"\x7a\x00",
    b"\x7a\xff\xff\xff\xff\x0f",
    b"\x7a" + varint(2**63),
    b"\x0a" + varint(2**31 - 1),
    b"\x80" * 9 + b"\x01",
    b"\xff" * 10,
    varint(15 << 3 | 2 | 1 << 35),
)


def micro_batch_frames(*, is_first: bool) -> list[bytes]:
    """Valid micro-batches: one row, several with what they want of the logits, none wanted, and with padding."""
    plans = [
        ([(0, 0, 5)], [(0, 0, [3, 1])], [pb.OutputGroup(token_indices=[4], num_candidates=1)]),
        (
            [(1, 0, 3), (0, 0, 4)],
            [(0, 0, [0]), (1, 0, [2])],
            [
                pb.OutputGroup(token_indices=[2, 6], num_candidates=40, log_sum_exp=True, temperatures=[0.5, 1.0]),
                pb.OutputGroup(token_indices=[1]),
            ],
        ),
        ([(2, 0, 24)], [(2, 0, [0, 1, 2, 3, 4, 5, 7])], []),
    ]
    frames = []
    for rows, block_table_updates, outputs in plans:
        num_tokens = sum(row[2] for row in rows)
        shape = (num_tokens,) if is_first else (num_tokens, fake_shard.HIDDEN_SIZE)
        tensor = torch.arange(shape[0], dtype=torch.int32) if is_first else torch.ones(shape)
        header = pb.MicroBatchHeader(
            lease_id=fake_shard.LEASE_ID,
            epoch=fake_shard.EPOCH,
            step=1,
            row_slots=[row[0] for row in rows],
            row_starts=[row[1] for row in rows],
            row_num_tokens=[row[2] for row in rows],
            block_table_updates=[
                pb.BlockTableUpdate(slot=slot, first=first, block_ids=ids) for slot, first, ids in block_table_updates
            ],
            outputs=outputs,
            dtype=model_pb2.DTYPE_INT32 if is_first else model_pb2.DTYPE_FLOAT32,
            first_layer=0 if is_first else 2,
            timings=[] if is_first else [pb.StageTiming(decode_s=0.1, queue_s=0.2, compute_s=0.3)],
        )
        frames.append(write_frame(pb.MicroBatch(header=header), [tensor.numpy().tobytes()]))
    return frames


def frame(scratch: Path) -> Target:
    """read_frame beside protobuf itself: what we read is what it reads, and what it does not read we refuse."""
    result = pb.StepResult(epoch=1, step=2, outputs=[pb.OutputBlock(num_rows=1, num_columns=4)])
    responses = [
        write_frame(pb.SessionResponse(result=result), [b"0123456789abcdef"]),
        write_frame(pb.SessionResponse(load=pb.LoadReport(num_steps=3, compute_s=1.5))),
    ]
    corpus = [*micro_batch_frames(is_first=True), *micro_batch_frames(is_first=False), *responses]

    def check(data: bytes) -> None:
        if not sum([_check_frame(kind, data) for kind in (pb.MicroBatch, pb.SessionResponse)]):
            raise errors.InvalidArgument("neither of them")

    return Target("frame", corpus, check, PROTOBUF_WORDS, share=25)


def _check_frame(kind: type[Message], data: bytes) -> bool:
    try:
        message, payload = read_frame(kind, data)
    except errors.InvalidArgument:
        return False
    whole = kind.FromString(data)
    assert whole.payload == bytes(payload)  # type: ignore[attr-defined]
    whole.ClearField("payload")
    # Serialised, as messages with a NaN in them equal nothing; what is unknown to the contract is kept by both.
    assert whole.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)
    return True


class _Forward:
    """A service that is asked for one lease and sent one frame after another, each in a call of its own."""

    def __init__(self) -> None:
        self._shard = fake_shard.first_and_last()
        self._loop = asyncio.new_event_loop()

    def check(self, data: bytes) -> None:
        self._loop.run_until_complete(asyncio.wait_for(self._send(data), fake_shard.WAIT_S))

    async def _send(self, data: bytes) -> None:
        runner = self._shard.runner
        session = fake_shard.FakeContext(fake_shard.open_request(runner.stage), stays_open=True)
        holding = asyncio.create_task(self._shard.service.session(None, session))  # type: ignore[arg-type]
        try:
            await session.answered.wait()
            num_before = runner.num_steps
            try:
                await self._shard.service.forward(None, fake_shard.FakeContext(data))  # type: ignore[arg-type]
            except fake_shard.Aborted as aborted:
                raise aborted.error from None
            assert runner.num_steps == num_before + 1, "neither refused nor run"
        finally:
            session.close()
            await holding


def micro_batch(scratch: Path) -> Target:
    forward = _Forward()
    return Target("micro_batch", micro_batch_frames(is_first=True), forward.check, PROTOBUF_WORDS, share=8)


def hidden_states(scratch: Path) -> Target:
    """The same for a stage in the middle; up to where it is checked, as there is nothing after it."""
    shard = fake_shard.in_the_middle()

    def check(data: bytes) -> None:
        lease = Lease(
            fake_shard.LEASE_ID,
            fake_shard.EPOCH,
            first_block=0,
            num_blocks=fake_shard.NUM_BLOCKS,
            block_size=fake_shard.BLOCK_SIZE,
            max_slots=fake_shard.MAX_SLOTS,
            context_length=fake_shard.CONTEXT_LENGTH,
            max_batch_tokens=fake_shard.MAX_BATCH_TOKENS,
        )
        message, payload = read_frame(pb.MicroBatch, data)
        step = read_step(shard.stage, LeaseSession(lease), message.header, payload)
        shard.runner.submit(step, lambda result, times: None)
        assert not shard.runner.stage.is_last

    return Target("hidden_states", micro_batch_frames(is_first=False), check, PROTOBUF_WORDS, share=12)


def session(scratch: Path) -> Target:
    """Requests on a session, as many as there are in the input, each with its length before it."""
    shard = fake_shard.first_and_last()
    loop = asyncio.new_event_loop()
    opened = fake_shard.open_request(shard.runner.stage)
    report = pb.SessionRequest(report_load=pb.ReportLoad(number=2**64 - 1))
    other = fake_shard.open_request(shard.runner.stage, num_blocks=3, max_slots=4096, epoch=2**64 - 1)

    def join(*requests: pb.SessionRequest) -> bytes:
        parts = [request.SerializeToString() for request in requests]
        return b"".join(struct.pack("<H", len(part)) + part for part in parts)

    async def hold(requests: list[pb.SessionRequest]) -> None:
        try:
            await shard.service.session(None, fake_shard.FakeContext(*requests))  # type: ignore[arg-type]
        except fake_shard.Aborted as aborted:
            raise aborted.error from None

    def check(data: bytes) -> None:
        requests = []
        while len(data) >= 2 and len(requests) < 20:
            (length,) = struct.unpack_from("<H", data)
            part, data = data[2 : 2 + length], data[2 + length :]
            try:
                requests.append(pb.SessionRequest.FromString(part))
            except DecodeError:
                break  # gRPC ends the call
        try:
            loop.run_until_complete(asyncio.wait_for(hold(requests), fake_shard.WAIT_S))
        finally:
            num_free = shard.stage.num_free_blocks(0)
            assert num_free == fake_shard.NUM_BLOCKS, f"{num_free} blocks are free after the session's end"

    return Target("session", [join(opened, report), join(other), join(report)], check, PROTOBUF_WORDS, share=8)


class _Assign:
    """The same requests to a shard with a lease open on its layers, and to one that has none or got some just now."""

    NUM_LAYERS = 6

    def __init__(self) -> None:
        self._leased = fake_shard.first_and_last(assignable=True)
        self._free = fake_shard.make_shard(None, self.NUM_LAYERS, assignable=True)
        self._loop = asyncio.new_event_loop()

    def check(self, data: bytes) -> None:
        try:
            request = pb.AssignRequest.FromString(data)
        except DecodeError as error:
            raise errors.InvalidArgument("gRPC ends the call") from error
        self._loop.run_until_complete(asyncio.wait_for(self._take(request), fake_shard.WAIT_S))

    async def _take(self, request: pb.AssignRequest) -> None:
        await self._take_beside_a_lease(request)
        num_loaded = len(self._free.loaded)
        before = self._free.assignment.stage
        error = await self._send(self._free, request)
        if error is not None:
            assert self._free.assignment.stage is before, "a refusal changed the layers"
            assert len(self._free.loaded) == num_loaded
            raise error
        layers = self._free.stage.layers
        assert (layers.start, layers.end) == (request.layers.start, request.layers.end)
        assert 0 <= layers.start < layers.end <= self.NUM_LAYERS

    async def _take_beside_a_lease(self, request: pb.AssignRequest) -> None:
        """The lease goes on as it was: same stage, same blocks, and its next step runs."""
        shard = self._leased
        session = fake_shard.FakeContext(fake_shard.open_request(shard.runner.stage), stays_open=True)
        holding = asyncio.create_task(shard.service.session(None, session))  # type: ignore[arg-type]
        try:
            await session.answered.wait()
            stage, num_free, num_steps = shard.stage, shard.stage.num_free_blocks(0), shard.runner.num_steps
            await self._send(shard, request)
            assert shard.stage is stage
            assert stage.num_free_blocks(0) == num_free
            assert len(shard.loaded) == 1, "it was loaded anew under a lease"
            frame = micro_batch_frames(is_first=True)[0]
            await shard.service.forward(None, fake_shard.FakeContext(frame))  # type: ignore[arg-type]
            assert shard.runner.num_steps == num_steps + 1
        finally:
            session.close()
            await holding

    @staticmethod
    async def _send(shard: fake_shard.FakeShard, request: pb.AssignRequest) -> errors.StagecoachError | None:
        try:
            await shard.service.assign(request, fake_shard.FakeContext())  # type: ignore[arg-type]
        except fake_shard.Aborted as aborted:
            return aborted.error
        return None


def assign(scratch: Path) -> Target:
    """Assign, with and without a lease on the shard."""
    ranges = [(0, 2), (0, 6), (2, 4), (5, 6), (0, 0), (4, 2), (0, 7), (2**32 - 2, 2**32 - 1)]
    corpus = [
        pb.AssignRequest(
            protocol_version=PROTOCOL_VERSION,
            model_fingerprint=fake_shard.FINGERPRINT,
            layers=model_pb2.LayerRange(start=start, end=end),
        ).SerializeToString()
        for start, end in ranges
    ]
    return Target("assign", corpus, _Assign().check, PROTOBUF_WORDS, share=2)
