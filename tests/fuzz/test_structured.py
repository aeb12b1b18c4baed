"""Messages that are well-formed and wrong: what hypothesis makes from their shape, near the limits."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach import errors
from stagecoach.rpc.framing import PAYLOAD_FIELD, read_frame
from stagecoach.v1 import inference_pb2, model_pb2
from stagecoach.v1 import shard_pb2 as pb
from stagecoach_router.frontend.convert import read_params
from stagecoach_router.pipelines.shard_description import check_description
from stagecoach_shard.checkpoints.raw_config import RawConfig
from stagecoach_shard.checkpoints.tensor_table import read_header
from stagecoach_shard.models.families import read_config
from tests.fuzz import lease_model
from tests.fuzz.checkpoint_targets import CONFIG
from tests.fuzz.lease_target import header
from tests.fuzz.mutation import varint

UINT32 = 2**32 - 1
UINT64 = 2**64 - 1


def near(*limits: int) -> st.SearchStrategy[int]:
    """Whole numbers of 32 bits at and around the limits, and at the ends."""
    points = {0, 1, 2, UINT32, *(limit + change for limit in limits for change in (-1, 0, 1))}
    return st.sampled_from(sorted(point for point in points if 0 <= point <= UINT32))


slots = st.one_of(st.integers(0, lease_model.MAX_SLOTS - 1), near(lease_model.MAX_SLOTS))
blocks = st.one_of(st.integers(0, lease_model.NUM_BLOCKS - 1), near(lease_model.NUM_BLOCKS))
starts = st.one_of(st.integers(0, lease_model.CONTEXT_LENGTH), near(lease_model.CONTEXT_LENGTH))
counts = st.one_of(st.integers(1, 6), near(lease_model.MAX_BATCH_TOKENS, lease_model.BLOCK_SIZE))
rows = st.lists(st.tuples(slots, starts, counts), max_size=4)
block_table_updates = st.lists(
    st.tuples(slots, st.one_of(st.integers(0, 6), near(6)), st.lists(blocks, max_size=7)), max_size=5
)


@given(st.lists(st.tuples(rows, block_table_updates, st.sampled_from([0, 0, 0, 0, 1, -1, UINT64])), max_size=8))
def test_a_lease_accepts_what_its_model_accepts_and_names_the_same_places(steps: Any) -> None:
    both = lease_model.LeaseBesideModel()
    for step_rows, step_updates, off in steps:
        step = both.next_step + off if off != UINT64 else UINT64
        both.take(header(step_rows, step_updates, step=step))


@st.composite
def honest_step(draw: st.DrawFn, both: lease_model.LeaseBesideModel) -> pb.MicroBatchHeader:
    """A step as a router might plan it: tables that grow, rows that begin where the last ones ended or before."""
    tables = both.model.tables
    chosen = draw(st.lists(st.integers(0, lease_model.MAX_SLOTS - 1), min_size=1, max_size=3, unique=True))
    step_rows, step_updates = [], []
    for slot in chosen:
        block_ids = draw(st.lists(st.integers(0, lease_model.NUM_BLOCKS - 1), max_size=3))
        first = draw(st.integers(0, len(tables[slot])))
        length = len(tables[slot])
        if block_ids and first + len(block_ids) <= -(-lease_model.CONTEXT_LENGTH // lease_model.BLOCK_SIZE):
            step_updates.append((slot, first, block_ids))
            length = first + len(block_ids)
        room = min(length * lease_model.BLOCK_SIZE, lease_model.CONTEXT_LENGTH)
        if room:
            start = draw(st.integers(0, room - 1))
            step_rows.append((slot, start, draw(st.integers(1, min(5, room - start)))))
    return header(step_rows, step_updates, step=both.next_step)


@given(st.data())
def test_no_row_begins_behind_what_its_lease_never_wrote(data: st.DataObject) -> None:
    both = lease_model.LeaseBesideModel()
    for _ in range(data.draw(st.integers(1, 8))):
        both.take(data.draw(honest_step(both)))


_field = st.one_of(
    st.tuples(st.integers(0, 20), st.just(0), st.integers(0, UINT64)).map(lambda f: varint(f[0] << 3) + varint(f[2])),
    st.tuples(st.integers(1, 20), st.binary(max_size=40)).map(
        lambda f: varint(f[0] << 3 | 2) + varint(len(f[1])) + f[1]
    ),
    st.tuples(st.integers(1, 20), st.integers(0, 2**70), st.binary(max_size=9)).map(
        lambda f: varint(f[0] << 3 | 2) + varint(f[1]) + f[2]
    ),
    st.integers(1, 20).map(lambda number: varint(number << 3 | 1) + bytes(8)),
    st.integers(1, 20).map(lambda number: varint(number << 3 | 5) + bytes(4)),
    st.binary(max_size=20).map(lambda data: varint(PAYLOAD_FIELD << 3 | 2) + varint(len(data)) + data),
)


@given(st.lists(_field, max_size=10).map(b"".join))
def test_a_frame_is_read_as_protobuf_reads_it_or_refused(data: bytes) -> None:
    try:
        message, payload = read_frame(pb.MicroBatch, data)
    except errors.InvalidArgument:
        return
    whole = pb.MicroBatch.FromString(data)
    assert bytes(payload) == whole.payload
    assert message.header == whole.header


_numbers = st.one_of(
    st.integers(-2, 3), st.sampled_from([2**31, 2**63, 2**64, 10**400, -1]), st.floats(), st.text(max_size=3), st.none()
)
_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "X"]), _numbers, st.lists(st.none())),
        "shape": st.one_of(st.lists(_numbers, max_size=12), st.text(max_size=2), _numbers),
        "data_offsets": st.one_of(st.lists(_numbers, max_size=3), st.text(max_size=2), _numbers),
    },
)


@given(st.dictionaries(st.text(max_size=4), st.one_of(_entries, _numbers), max_size=3))
def test_a_tensor_table_lies_within_its_file_or_is_refused(tmp_path_factory: Any, entries: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    try:
        table = read_header(path)
    except errors.CheckpointError as error:
        errors.to_trailing_metadata(error)
        return
    for entry in table.values():
        # Two numbers to a byte, in the smallest dtype that there is.
        assert math.prod(entry.shape) <= 2 * 64


_values = st.one_of(_numbers, st.booleans(), st.lists(st.sampled_from(["full_attention", "x"]), max_size=3))


@given(st.dictionaries(st.sampled_from([*CONFIG, "head_dim", "layer_types", "rope_scaling"]), _values, max_size=3))
def test_a_configuration_has_sane_sizes_or_is_refused(changes: dict[str, Any]) -> None:
    try:
        config = read_config(RawConfig(CONFIG | changes))
    except errors.CheckpointError:
        return
    assert len(config.windows) == config.num_layers <= 4096
    assert max(config.hidden_size, config.vocab_size, config.context_length, config.head_dim) < 2**31


@given(
    st.dictionaries(
        st.sampled_from(["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]),
        st.floats(width=64),
        max_size=5,
    )
)
def test_sampling_parameters_are_numbers_in_their_limits_or_refused(values: dict[str, float]) -> None:
    try:
        params = read_params(inference_pb2.SamplingParams(**values))
    except errors.InvalidArgument:
        return
    assert all(math.isfinite(getattr(params, name)) for name in values)


@pytest.mark.parametrize("value", [0, UINT32])
@pytest.mark.parametrize(
    "name", ["block_size", "max_batch_tokens", "num_blocks", "model.num_layers", "model.vocab_size"]
)
def test_a_shard_of_impossible_sizes_is_refused_by_name(name: str, value: int) -> None:
    description = pb.DescribeResponse(
        model=model_pb2.ModelDescription(num_layers=2, hidden_size=8, vocab_size=9, context_length=10),
        layers=model_pb2.LayerRange(start=0, end=2),
        dtype=model_pb2.DTYPE_FLOAT32,
        block_size=16,
        num_blocks=4,
        max_batch_tokens=8,
    )
    check_description("h:1", description)
    owner = description.model if name.startswith("model.") else description
    setattr(owner, name.removeprefix("model."), value)
    with pytest.raises(errors.ModelMismatch) as caught:
        check_description("h:1", description)
    assert (caught.value.field, caught.value.value) == (name, str(value))


def test_a_layer_range_the_wrong_way_round_is_refused() -> None:
    description = pb.DescribeResponse(
        model=model_pb2.ModelDescription(num_layers=4, hidden_size=8, vocab_size=9, context_length=10),
        layers=model_pb2.LayerRange(start=3, end=2),
        block_size=16,
        num_blocks=4,
        max_batch_tokens=8,
    )
    with pytest.raises(errors.ModelMismatch, match="layers"):
        check_description("h:1", description)


def test_the_model_itself_refuses_what_the_contract_does() -> None:
    both = lease_model.LeaseBesideModel()
    assert both.take(header([(0, 0, 6)], [(0, 0, [3, 1])]))
    refused = [
        header([(1, 4, 1)], [(1, 0, [4, 5])], step=2),  # block 4 was never written
        header([(1, 6, 1)], [(1, 0, [3, 1, 0]), (1, 0, [1, 1])], step=2),  # position 6 of block 1 was not either
        header([(0, 6, 1), (0, 7, 1)], [], step=2),
        header([(0, 6, 1)], [(0, 2, [lease_model.NUM_BLOCKS])], step=2),
        header([(0, 6, 1)], [], step=2**64 - 1),
        header([(0, 6, 1)], [(0, 0, [])] * (lease_model.MAX_UPDATES + 1), step=2),
    ]
    assert not any(both.take(one) for one in refused)
    # Sharing a prefix within the lease, and going back, are what tables are for.
    assert both.take(header([(2, 4, 3), (0, 2, 1)], [(0, 0, [3, 1]), (2, 0, [3, 0])], step=2))
