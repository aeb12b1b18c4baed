"""Writes the scheduler's plans as the messages that shards read, and reads their results. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from stagecoach.errors import ShardFault
from stagecoach.rpc.framing import write_frame
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.sampling.outputs import CandidateRows, OutputWant, WholeRows
from stagecoach_router.scheduling.plan import Plan, Row

_FLOAT32: np.dtype[np.float32] = np.dtype("<f4")
_INT32: np.dtype[np.int32] = np.dtype("<i4")
_ScalarT = TypeVar("_ScalarT", bound=np.generic)


@dataclass(frozen=True, slots=True)
class OutputOrder:
    """Which row each returned output is for: groups in the order they were asked, rows in the order within a group."""

    groups: tuple[tuple[OutputWant, tuple[Row, ...]], ...]


@dataclass(slots=True)
class _Group:
    """An output group that is being put together."""

    want: OutputWant
    rows: list[Row] = field(default_factory=list)
    token_indices: list[int] = field(default_factory=list)
    temperatures: list[float] = field(default_factory=list)


def write_micro_batch(plan: Plan, *, lease_id: int, epoch: int, step: int) -> tuple[bytes, OutputOrder]:
    """The frame for the first stage, and the order in which the outputs will come."""
    token_ids: list[int] = []
    groups: dict[tuple[int, bool], _Group] = {}
    for row in plan.rows:
        sequence, _, start, num_tokens, wants_logits, _ = row
        if num_tokens == 1:
            token_ids.append(sequence.token_at(start))
        else:
            token_ids += sequence.tokens(start, start + num_tokens)
        if wants_logits:
            want = sequence.next_want
            key = (want.num_candidates, want.log_sum_exp)
            group = groups.get(key)
            if group is None:
                group = groups[key] = _Group(want)
            group.rows.append(row)
            group.token_indices.append(len(token_ids) - 1)
            if want.log_sum_exp:
                group.temperatures.append(want.temperature)
    # Whole lists at a time: a repeated field that grows by one element after the other costs several times as much.
    header = shard_pb2.MicroBatchHeader(
        lease_id=lease_id,
        epoch=epoch,
        step=step,
        row_slots=[row.slot for row in plan.rows],
        row_starts=[row.start for row in plan.rows],
        row_num_tokens=[row.num_tokens for row in plan.rows],
        dtype=model_pb2.DTYPE_INT32,
    )
    for update in plan.block_table_updates:
        header.block_table_updates.add(slot=update.slot, first=update.first, block_ids=update.block_ids)
    for (num_candidates, log_sum_exp), group in groups.items():
        header.outputs.add(
            token_indices=group.token_indices,
            num_candidates=num_candidates,
            log_sum_exp=log_sum_exp,
            temperatures=group.temperatures,
        )
    payload = np.array(token_ids, dtype=_INT32).data.cast("B")
    frame = write_frame(shard_pb2.MicroBatch(header=header), [payload])
    return frame, OutputOrder(tuple((group.want, tuple(group.rows)) for group in groups.values()))


# The rows of one output group, and what came for them.
GroupOutputs = tuple[tuple[Row, ...], CandidateRows | WholeRows]


def read_outputs(
    result: shard_pb2.StepResult, payload: memoryview, order: OutputOrder, vocab_size: int
) -> list[GroupOutputs]:
    """The outputs of each group of rows, in order. Raises ShardFault where the result is not what was asked for."""
    if len(result.outputs) != len(order.groups):
        raise ShardFault(f"step {result.step}: {len(order.groups)} outputs asked for, {len(result.outputs)} came")
    reader = _Reader(payload)
    outputs: list[GroupOutputs] = []
    for block, (want, rows) in zip(result.outputs, order.groups, strict=True):
        columns = min(want.num_candidates, vocab_size) or vocab_size
        asked = (len(rows), columns, want.num_candidates > 0, want.log_sum_exp and want.num_candidates > 0)
        got = (block.num_rows, block.num_columns, block.candidates, block.log_sum_exp)
        if got != asked:
            raise ShardFault(
                f"step {result.step}: output {asked} asked for, {got} came", field="outputs", limit=asked, value=got
            )
        if not block.candidates:
            logits = reader.logits(block.dtype, len(rows) * columns).reshape(len(rows), columns)
            outputs.append((rows, WholeRows(logits)))
            continue
        ids = reader.take(_INT32, len(rows) * columns).reshape(len(rows), columns)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ShardFault(f"step {result.step}: a token id past the vocabulary", field="payload", limit=vocab_size)
        logits = reader.logits(block.dtype, len(rows) * columns).reshape(len(rows), columns)
        plain = scaled = None
        if block.log_sum_exp:
            plain, scaled = reader.take(_FLOAT32, len(rows)), reader.take(_FLOAT32, len(rows))
        outputs.append((rows, CandidateRows(ids, logits, plain, scaled)))
    reader.finish()
    return outputs


class _Reader:
    """Takes one array after the other off a payload."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._position = 0

    def take(self, dtype: np.dtype[_ScalarT], count: int) -> npt.NDArray[_ScalarT]:
        end = self._position + count * dtype.itemsize
        if end > len(self._payload):
            raise ShardFault(
                f"result: {end} bytes expected, {len(self._payload)} came",
                field="payload",
                limit=len(self._payload),
                value=end,
            )
        array = np.frombuffer(self._payload, dtype=dtype, count=count, offset=self._position)
        self._position = end
        return array

    def logits(self, dtype: int, count: int) -> npt.NDArray[np.float32]:
        """`count` logits as float32, whatever dtype they travelled in."""
        if dtype == model_pb2.DTYPE_FLOAT32:
            return self.take(_FLOAT32, count).astype(np.float32, copy=False)
        if dtype == model_pb2.DTYPE_FLOAT16:
            return self.take(np.dtype("<f2"), count).astype(np.float32)
        if dtype == model_pb2.DTYPE_BFLOAT16:
            # The upper half of a float32.
            return (self.take(np.dtype("<u2"), count).astype(np.uint32) << 16).view(np.float32)
        raise ShardFault(f"result: logits of dtype {dtype}", field="dtype", value=dtype)

    def finish(self) -> None:
        if self._position != len(self._payload):
            surplus = len(self._payload) - self._position
            raise ShardFault(
                f"result: {surplus} bytes too many", field="payload", limit=self._position, value=len(self._payload)
            )
