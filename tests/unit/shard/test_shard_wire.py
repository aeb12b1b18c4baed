"""Between the contract's messages and tensors: views where they can be, and nothing unchecked."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument, OutOfRange
from stagecoach.rpc.framing import PAYLOAD_ALIGNMENT, FrameCounter, read_frame
from stagecoach.rpc.shard_rpc import MAX_CANDIDATES
from stagecoach.topology import LayerRange
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_shard.attention.batch import Batch
from stagecoach_shard.kv_cache import KVCache
from stagecoach_shard.leases import wire
from stagecoach_shard.models.families import open_checkpoint
from stagecoach_shard.runtime.load_meter import StepTimes
from stagecoach_shard.runtime.outputs import Output
from stagecoach_shard.runtime.stage import Stage
from tests.unit.shard.stage_chain import CPU
from tests.unit.shard.tiny_models import MODELS, save_tiny_model

HIDDEN, VOCAB = 6, 50
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _read(
    payload: memoryview, wire_dtype: int, num_tokens: int, dtype: torch.dtype | None
) -> tuple[torch.Tensor, bool]:
    return wire.read_inputs(
        payload, wire_dtype, num_tokens=num_tokens, hidden_size=HIDDEN, dtype=dtype, vocab_size=VOCAB
    )


def _at(offset: int, data: bytes) -> memoryview:
    """`data` at an address that is so many bytes past a multiple of 64."""
    room = np.zeros(len(data) + 128, dtype=np.uint8)
    start = -room.ctypes.data % 64 + offset
    room[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return memoryview(room)[start : start + len(data)]


def _states(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)


@given(
    num_rows=st.integers(1, 300),
    slot=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
)
def test_hidden_states_go_from_stage_to_stage_without_a_copy_whatever_the_header(
    num_rows: int, slot: int, num_tokens: int, dtype: torch.dtype
) -> None:
    header = pb.MicroBatchHeader(lease_id=7, epoch=1, step=3, row_slots=[slot] * num_rows)
    states = _states(num_tokens, dtype)
    frame = wire.write_hidden_states(header, states)
    counter = FrameCounter()
    message, payload = read_frame(pb.MicroBatch, frame, counter)
    read, copied = _read(payload, message.header.dtype, num_tokens, dtype)
    assert torch.equal(read, states)
    assert list(message.header.row_slots) == [slot] * num_rows
    assert not copied
    assert read.data_ptr() % PAYLOAD_ALIGNMENT == 0
    assert read.data_ptr() == np.frombuffer(payload, dtype=np.uint8).ctypes.data
    assert (counter.num_frames, counter.num_fast_frames) == (1, 1)
    assert pb.MicroBatch.FromString(frame).payload == bytes(payload)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", range(9))
def test_only_what_is_not_aligned_to_its_elements_is_copied(dtype: torch.dtype, offset: int) -> None:
    states = _states(5, dtype)
    read, copied = _read(_at(offset, bytes(wire.tensor_bytes(states))), wire.DTYPES[dtype], 5, dtype)
    assert torch.equal(read, states)
    assert copied == (offset % dtype.itemsize != 0)
    assert read.data_ptr() % dtype.itemsize == 0


def test_a_copied_payload_is_not_counted_as_fast() -> None:
    counter = FrameCounter()
    read_frame(pb.MicroBatch, pb.MicroBatch(payload=b"abc").SerializeToString(), counter)
    counter.payload_was_copied()
    assert (counter.num_frames, counter.num_fast_frames) == (1, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_stage_computes_the_same_from_any_address(
    dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.mktemp("llama")
    save_tiny_model(folder, MODELS["llama"])
    checkpoint, layers = open_checkpoint(folder), LayerRange(1, 3)
    stage = Stage.load(checkpoint, layers, dtype=dtype, device=CPU)
    hidden_size = checkpoint.config.hidden_size
    states = torch.randn(5, hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    batch = Batch.build(
        starts=np.array([0, 0]),
        num_tokens=np.array([4, 1]),
        block_tables=np.array([[0], [1]], dtype=np.int32),
        block_size=4,
    )

    def run(inputs: torch.Tensor) -> torch.Tensor:
        cache = KVCache.allocate(checkpoint.config, layers, num_blocks=2, block_size=4, dtype=dtype, device=CPU)
        return stage.forward(inputs, batch, cache)

    expected = run(states)
    for offset in range(2 * dtype.itemsize):
        read, _ = wire.read_inputs(
            _at(offset, bytes(wire.tensor_bytes(states))),
            wire.DTYPES[dtype],
            num_tokens=5,
            hidden_size=hidden_size,
            dtype=dtype,
            vocab_size=VOCAB,
        )
        torch.testing.assert_close(run(read), expected, atol=0, rtol=0)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_token_ids_are_read(offset: int) -> None:
    read, copied = _read(_at(offset, struct.pack("<3i", 0, 7, VOCAB - 1)), wire.DTYPES[torch.int32], 3, None)
    assert read.tolist() == [0, 7, VOCAB - 1]
    assert copied == (offset == 1)


@pytest.mark.parametrize("token_id", [-1, VOCAB])
def test_a_token_id_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(OutOfRange) as caught:
        _read(memoryview(struct.pack("<2i", 3, token_id)), wire.DTYPES[torch.int32], 2, None)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("payload", str(VOCAB), str(token_id))


@pytest.mark.parametrize("num_bytes", [0, 8, 11, 13, 16])
def test_a_payload_of_another_size_is_refused(num_bytes: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _read(memoryview(bytes(num_bytes)), wire.DTYPES[torch.int32], 3, None)
    assert (caught.value.field, caught.value.limit, caught.value.value) == ("payload", "12", str(num_bytes))


@pytest.mark.parametrize(
    ("wire_dtype", "dtype"),
    [
        (wire.DTYPES[torch.float32], None),
        (0, None),
        (wire.DTYPES[torch.int32], torch.float32),
        (wire.DTYPES[torch.float16], torch.bfloat16),
        (99, torch.bfloat16),
    ],
)
def test_another_dtype_is_refused(wire_dtype: int, dtype: torch.dtype | None) -> None:
    with pytest.raises(InvalidArgument) as caught:
        _read(memoryview(bytes(12)), wire_dtype, 1, dtype)
    assert (caught.value.field, caught.value.value) == ("dtype", str(wire_dtype))


def test_output_groups_are_read() -> None:
    whole, candidates = wire.read_wanted(
        [
            pb.OutputGroup(token_indices=[0, 2]),
            pb.OutputGroup(token_indices=[1], num_candidates=40, log_sum_exp=True, temperatures=[0.5]),
        ],
        num_tokens=3,
        vocab_size=260,
    )
    assert (whole.token_indices.tolist(), whole.num_candidates, whole.temperatures) == ([0, 2], 0, None)
    assert candidates.temperatures is not None
    assert (candidates.num_candidates, candidates.temperatures.tolist()) == (40, [0.5])
    assert wire.read_wanted([], num_tokens=3, vocab_size=260) == []


def test_a_result_that_could_not_be_sent_is_refused_before_it_is_computed() -> None:
    whole_rows = pb.OutputGroup(token_indices=range(1000))
    with pytest.raises(OutOfRange) as caught:
        wire.read_wanted([whole_rows], num_tokens=1000, vocab_size=128_256)
    assert (caught.value.field, caught.value.value) == ("outputs", str(1000 * 128_256 * 4))
    assert len(wire.read_wanted([whole_rows], num_tokens=1000, vocab_size=32_000)) == 1


@pytest.mark.parametrize(
    ("groups", "field", "kind"),
    [
        ([pb.OutputGroup()], "outputs.token_indices", OutOfRange),
        ([pb.OutputGroup(token_indices=[3])], "outputs.token_indices", OutOfRange),
        (
            [pb.OutputGroup(token_indices=[0], num_candidates=MAX_CANDIDATES + 1)],
            "outputs.num_candidates",
            OutOfRange,
        ),
        ([pb.OutputGroup(token_indices=[0, 1], log_sum_exp=True)], "outputs.temperatures", InvalidArgument),
        ([pb.OutputGroup(token_indices=[0], temperatures=[1.0])], "outputs.temperatures", InvalidArgument),
        ([pb.OutputGroup(token_indices=[0, 1]), pb.OutputGroup(token_indices=[0, 0])], "outputs", OutOfRange),
        *(
            (
                [pb.OutputGroup(token_indices=[0], log_sum_exp=True, temperatures=[temperature])],
                "outputs.temperatures",
                OutOfRange,
            )
            for temperature in (float("nan"), float("inf"), -1.0)
        ),
    ],
)
def test_output_groups_that_cannot_be_are_refused(
    groups: list[pb.OutputGroup], field: str, kind: type[InvalidArgument]
) -> None:
    with pytest.raises(kind) as caught:
        wire.read_wanted(groups, num_tokens=3, vocab_size=260)
    assert caught.value.field == field


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_say_what_their_arrays_are(dtype: torch.dtype) -> None:
    logits = _states(2, dtype)
    token_ids, values, sums = torch.tensor([[4, 1]], dtype=torch.int32), torch.tensor([[2.5, 1.0]]), torch.tensor([3.0])
    timings = [pb.StageTiming(queue_s=0.5), pb.StageTiming(compute_s=0.25)]
    frame = wire.write_result(
        pb.MicroBatchHeader(epoch=5, step=9, timings=timings),
        [
            Output(logits),
            Output(values, token_ids),
            Output(values, token_ids, (sums, sums)),
        ],
    )
    message, payload = read_frame(pb.SessionResponse, frame)
    candidates = {"num_rows": 1, "num_columns": 2, "candidates": True, "dtype": wire.DTYPES[torch.float32]}
    assert (message.result.epoch, message.result.step) == (5, 9)
    assert list(message.result.timings) == timings
    assert list(message.result.outputs) == [
        pb.OutputBlock(num_rows=2, num_columns=HIDDEN, dtype=wire.DTYPES[dtype]),
        pb.OutputBlock(**candidates),
        pb.OutputBlock(**candidates, log_sum_exp=True),
    ]
    pair = struct.pack("<2i2f", 4, 1, 2.5, 1.0)
    assert bytes(payload) == bytes(wire.tensor_bytes(logits)) + pair + pair + struct.pack("<2f", 3.0, 3.0)


@pytest.mark.parametrize(
    ("timings", "first_layer"),
    [
        ([pb.StageTiming()], 0),
        ([pb.StageTiming()] * 3, 2),
        ([pb.StageTiming(decode_s=math.inf)], 2),
        ([pb.StageTiming(), pb.StageTiming(queue_s=math.nan)], 2),
        ([pb.StageTiming(compute_s=-1e-9)], 2),
    ],
)
def test_timings_that_no_stages_before_can_have_measured_are_refused(
    timings: list[pb.StageTiming], first_layer: int
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wire.check_timings(timings, first_layer)
    assert caught.value.field == "timings"
    wire.check_timings([pb.StageTiming(compute_s=1e9)] * 2, 2)


def test_a_stage_adds_its_timing_after_those_before_it() -> None:
    header = pb.MicroBatchHeader(timings=[pb.StageTiming(decode_s=1.0)])
    wire.add_timing(header, StepTimes(decode_s=0.5, queue_s=0.25, compute_s=2.0))
    assert list(header.timings) == [
        pb.StageTiming(decode_s=1.0),
        pb.StageTiming(decode_s=0.5, queue_s=0.25, compute_s=2.0),
    ]


def test_the_bytes_of_a_contiguous_tensor_are_its_memory_and_others_are_laid_out_first() -> None:
    tensor = torch.arange(6, dtype=torch.int32).view(2, 3)
    view = wire.tensor_bytes(tensor)
    tensor[0, 0] = 77
    assert struct.unpack("<6i", view) == (77, 1, 2, 3, 4, 5)
    assert struct.unpack("<6i", wire.tensor_bytes(tensor.T)) == (77, 3, 1, 4, 2, 5)
