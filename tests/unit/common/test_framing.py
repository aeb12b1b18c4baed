"""The framing writes what protobuf writes, and reads what protobuf writes, without copying the payload."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.framing import MAX_ANSWER_HEADER_BYTES, FrameCounter, read_frame, write_frame
from stagecoach.v1 import shard_pb2 as pb

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
numbers = st.lists(u32, max_size=20)
block_table_updates = st.builds(pb.BlockTableUpdate, slot=u32, first=u32, block_ids=numbers)
groups = st.builds(
    pb.OutputGroup,
    token_indices=numbers,
    num_candidates=u32,
    log_sum_exp=st.booleans(),
    temperatures=st.lists(st.floats(width=32, allow_nan=False)),
)
headers = st.builds(
    pb.MicroBatchHeader,
    lease_id=u64,
    epoch=u64,
    step=u64,
    row_slots=numbers,
    row_starts=numbers,
    row_num_tokens=numbers,
    block_table_updates=st.lists(block_table_updates, max_size=4),
    outputs=st.lists(groups, max_size=4),
    dtype=st.sampled_from([0, 1, 2, 3, 4]),
)
micro_batches = st.builds(pb.MicroBatch, header=headers)
blocks = st.builds(pb.OutputBlock, num_rows=u32, num_columns=u32, candidates=st.booleans())
session_responses = st.one_of(
    st.builds(
        pb.SessionResponse, result=st.builds(pb.StepResult, epoch=u64, step=u64, outputs=st.lists(blocks, max_size=4))
    ),
    st.builds(pb.SessionResponse, load=st.builds(pb.LoadReport, num_steps=u64, compute_s=st.floats(allow_nan=False))),
)
payloads = st.lists(st.binary(max_size=300), max_size=4)


@given(message=st.one_of(micro_batches, session_responses), payload=payloads)
def test_a_frame_reads_back_as_it_was_written(message, payload):
    read, view = read_frame(type(message), write_frame(message, payload))
    assert read == message
    assert bytes(view) == b"".join(payload)


@given(message=st.one_of(micro_batches, session_responses), payload=payloads)
def test_plain_protobuf_parses_what_the_framing_writes(message, payload):
    parsed = type(message).FromString(write_frame(message, payload))
    assert parsed.payload == b"".join(payload)
    parsed.ClearField("payload")
    assert parsed == message


@given(message=st.one_of(micro_batches, session_responses), payload=st.binary(max_size=300))
def test_the_framing_parses_what_plain_protobuf_writes(message, payload):
    whole = type(message)()
    whole.CopyFrom(message)
    whole.payload = payload
    counter = FrameCounter()
    read, view = read_frame(type(message), whole.SerializeToString(), counter)
    assert (read, bytes(view)) == (message, payload)
    assert counter.num_fast_frames == counter.num_frames == 1


@given(message=micro_batches, first=st.binary(min_size=1, max_size=50), second=st.binary(min_size=1, max_size=50))
def test_fields_in_another_order_mean_the_same_as_to_protobuf(message, first, second):
    data = write_frame(pb.MicroBatch(), [first]) + message.SerializeToString() + write_frame(pb.MicroBatch(), [second])
    data += b"\xa2\x06\x03abc"  # field 100, unknown to this version
    read, view = read_frame(pb.MicroBatch, data)
    plain = pb.MicroBatch.FromString(data)
    assert bytes(view) == plain.payload == second
    assert read.header == plain.header == message.header


def test_the_payload_is_a_view_and_not_a_copy():
    data = write_frame(pb.MicroBatch(header=pb.MicroBatchHeader(step=1)), [b"x" * 1000])
    _, view = read_frame(pb.MicroBatch, data)
    assert view.obj is data


def test_a_payload_that_is_not_last_is_counted_as_slow():
    counter = FrameCounter()
    data = (
        write_frame(pb.MicroBatch(), [b"abc"]) + pb.MicroBatch(header=pb.MicroBatchHeader(step=7)).SerializeToString()
    )
    read, view = read_frame(pb.MicroBatch, data, counter)
    assert (read.header.step, bytes(view)) == (7, b"abc")
    assert (counter.num_frames, counter.num_fast_frames) == (1, 0)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(data):
    try:
        read, view = read_frame(pb.MicroBatch, data)
    except InvalidArgument:
        return
    plain = pb.MicroBatch.FromString(data)
    assert bytes(view) == plain.payload
    assert read.header == plain.header


@given(message=micro_batches, payload=st.binary(min_size=1, max_size=100), cut=st.integers(1, 100))
def test_a_frame_cut_inside_its_payload_is_refused(message, payload, cut):
    data = write_frame(message, [payload])
    with pytest.raises(InvalidArgument):
        read_frame(pb.MicroBatch, data[: -min(cut, len(payload))])


def test_a_frame_of_very_many_fields_is_refused():
    with pytest.raises(InvalidArgument, match="more than 64 fields"):
        read_frame(pb.MicroBatch, b"\xa0\x06\x00" * 65)


def test_a_header_is_looked_at_only_within_its_bound():
    fault = write_frame(pb.SessionResponse(fault=pb.Fault(status={"message": "x" * (6 << 20)})))
    with pytest.raises(InvalidArgument) as caught:
        read_frame(pb.SessionResponse, fault, max_header_bytes=MAX_ANSWER_HEADER_BYTES)
    assert (caught.value.field, caught.value.limit) == ("frame", str(MAX_ANSWER_HEADER_BYTES))


def test_the_largest_honest_answer_is_within_its_bound():
    result = pb.StepResult(epoch=2**64 - 1, step=2**64 - 1)
    for _ in range(1024):  # stages
        result.timings.add(decode_s=1.5, queue_s=1.5, compute_s=1.5)
    for _ in range(2 * 1024 + 1):  # one for each number of candidates, with and without log-sum-exp, and whole rows
        result.outputs.add(num_rows=4096, num_columns=1 << 20, candidates=True, log_sum_exp=True, dtype=4)
    data = write_frame(pb.SessionResponse(result=result), [bytes(16)])
    assert read_frame(pb.SessionResponse, data, max_header_bytes=MAX_ANSWER_HEADER_BYTES)[0].result == result
