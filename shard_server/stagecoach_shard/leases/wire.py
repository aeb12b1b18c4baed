"""Turns the contract's messages into tensors and back. Sizes are checked before a tensor is made of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from stagecoach.errors import InvalidArgument, OutOfRange
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.framing import FrameCounter, write_frame
from stagecoach.rpc.shard_rpc import MAX_CANDIDATES
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_shard.runtime.load_meter import Load, StepTimes
from stagecoach_shard.runtime.outputs import Output, WantedOutput

DTYPES: dict[torch.dtype, model_pb2.DType] = {
    torch.float32: model_pb2.DTYPE_FLOAT32,
    torch.bfloat16: model_pb2.DTYPE_BFLOAT16,
    torch.float16: model_pb2.DTYPE_FLOAT16,
    torch.int32: model_pb2.DTYPE_INT32,
}

# The most bytes of a step's result that can be sent, with room for what is around the arrays.
MAX_RESULT_BYTES = MAX_SHARD_MESSAGE_BYTES - (1 << 20)

# A received frame is `bytes`; we never write into the tensors that look into it.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def read_inputs(
    payload: memoryview,
    wire_dtype: int,
    *,
    num_tokens: int,
    hidden_size: int,
    dtype: torch.dtype | None,
    vocab_size: int,
) -> tuple[Tensor, bool]:
    """The tensor in a micro-batch's payload, which is a view of it, and whether it had to be copied after all.

    `dtype` None: token ids, int32 [num_tokens]; otherwise hidden states [num_tokens, hidden_size] of that dtype.

    It is copied where the payload begins at an address that is not a multiple of the element's size, which never
    happens in a frame of `write_frame`. Raises InvalidArgument where dtype or size are others, OutOfRange for a token
    id outside the vocabulary.
    """
    expected = dtype or torch.int32
    shape = (num_tokens,) if dtype is None else (num_tokens, hidden_size)
    if wire_dtype != DTYPES[expected]:
        raise InvalidArgument(
            f"dtype: expected {expected}, got {wire_dtype}", field="dtype", limit=expected, value=wire_dtype
        )
    num_bytes = math.prod(shape) * expected.itemsize
    if len(payload) != num_bytes:
        raise InvalidArgument(
            f"payload: {shape} of {expected} is {num_bytes} bytes, got {len(payload)}",
            field="payload",
            limit=num_bytes,
            value=len(payload),
        )
    tensor = torch.frombuffer(payload, dtype=expected).view(shape)
    # Torch reads elements at any address here, but compilers take an element's own alignment for granted.
    copied = tensor.data_ptr() % expected.itemsize != 0
    if copied:
        tensor = torch.frombuffer(bytearray(payload), dtype=expected).view(shape)
    if dtype is None:
        _check_token_ids(tensor, vocab_size)
    return tensor, copied


def _check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise OutOfRange(
            "payload: a token id outside the vocabulary",
            field="payload",
            limit=vocab_size,
            value=low if low < 0 else high,
        )


def read_wanted(groups: Sequence[shard_pb2.OutputGroup], num_tokens: int, vocab_size: int) -> list[WantedOutput]:
    """The logits that a micro-batch asks for. Raises InvalidArgument and OutOfRange."""
    num_left, result_bytes = num_tokens, 0
    wanted = []
    for group in groups:
        num_indices = len(group.token_indices)  # before anything is made of them
        if num_indices > num_left:
            raise OutOfRange("outputs: more outputs than tokens", field="outputs", limit=num_tokens)
        num_left -= num_indices
        wanted.append(_read_group(group, num_tokens))
        num_columns = min(group.num_candidates, vocab_size) or vocab_size
        result_bytes += num_indices * num_columns * (8 if group.num_candidates else 4)
    if result_bytes > MAX_RESULT_BYTES:
        raise OutOfRange(
            f"outputs: their result would have {result_bytes} bytes",
            field="outputs",
            limit=MAX_RESULT_BYTES,
            value=result_bytes,
        )
    return wanted


def _read_group(group: shard_pb2.OutputGroup, num_tokens: int) -> WantedOutput:
    if not group.token_indices or max(group.token_indices) >= num_tokens:
        raise OutOfRange(
            "outputs.token_indices: empty, or past the micro-batch", field="outputs.token_indices", limit=num_tokens
        )
    if group.num_candidates > MAX_CANDIDATES:
        raise OutOfRange(
            f"outputs.num_candidates: at most {MAX_CANDIDATES}",
            field="outputs.num_candidates",
            limit=MAX_CANDIDATES,
            value=group.num_candidates,
        )
    if len(group.temperatures) != (len(group.token_indices) if group.log_sum_exp else 0):
        raise InvalidArgument(
            "outputs.temperatures: one for each index where log_sum_exp is set, else none",
            field="outputs.temperatures",
        )
    for temperature in group.temperatures:
        if not 0.0 <= temperature < math.inf:
            raise OutOfRange(
                f"outputs.temperatures: {temperature}",
                field="outputs.temperatures",
                limit="[0, inf)",
                value=temperature,
            )
    return WantedOutput(
        token_indices=torch.tensor(group.token_indices, dtype=torch.int64),
        num_candidates=group.num_candidates,
        temperatures=torch.tensor(group.temperatures, dtype=torch.float32) if group.log_sum_exp else None,
    )


def check_timings(timings: Sequence[shard_pb2.StageTiming], first_layer: int) -> None:
    """Raises InvalidArgument for timings that the stages before layer `first_layer` cannot have measured.

    Each of those stages has at least one layer, so there are not more timings than layers. Fewer are accepted, as
    nothing is decided by them here.
    """
    if len(timings) > first_layer:
        raise InvalidArgument(
            f"timings: {len(timings)} stages before layer {first_layer}",
            field="timings",
            limit=first_layer,
            value=len(timings),
        )
    for timing in timings:
        for seconds in (timing.decode_s, timing.queue_s, timing.compute_s):
            if not 0.0 <= seconds < math.inf:
                raise InvalidArgument(f"timings: {seconds} s", field="timings", limit="[0, inf)", value=seconds)


def add_timing(header: shard_pb2.MicroBatchHeader, times: StepTimes) -> None:
    """Appends this stage's timing to those of the stages before it."""
    header.timings.add(decode_s=times.decode_s, queue_s=times.queue_s, compute_s=times.compute_s)


def write_hidden_states(header: shard_pb2.MicroBatchHeader, hidden_states: Tensor) -> bytes:
    """The frame for the next stage: the header as it came, with this stage's hidden states."""
    header.dtype = DTYPES[hidden_states.dtype]
    return write_frame(shard_pb2.MicroBatch(header=header), [tensor_bytes(hidden_states)])


def write_result(header: shard_pb2.MicroBatchHeader, outputs: Sequence[Output]) -> bytes:
    """The frame for the router: the result of the step of `header`, with the timings of all its stages."""
    result = shard_pb2.StepResult(epoch=header.epoch, step=header.step, timings=header.timings)
    payload = []
    for output in outputs:
        result.outputs.add(
            num_rows=output.logits.shape[0],
            num_columns=output.logits.shape[1],
            candidates=output.token_ids is not None,
            log_sum_exp=bool(output.log_sum_exps),
            dtype=DTYPES[output.logits.dtype],
        )
        payload += [tensor_bytes(array) for array in output.arrays]
    return write_frame(shard_pb2.SessionResponse(result=result), payload)


def write_load_report(total: Load, own: Load, frames: FrameCounter, number: int) -> bytes:
    """The frame for a router that asked question `number`: the stage's load, and that of the router's lease."""
    report = shard_pb2.LoadReport(
        num_steps=total.num_steps,
        num_tokens=total.num_tokens,
        compute_s=total.compute_s,
        wait_s=total.wait_s,
        queue_s=total.queue_s,
        decode_s=total.decode_s,
        encode_s=total.encode_s,
        queue_depth=total.queue_depth,
        num_fast_frames=frames.num_fast_frames,
        num_frames=frames.num_frames,
        number=number,
        lease_num_steps=own.num_steps,
        lease_compute_s=own.compute_s,
        lease_queue_depth=own.queue_depth,
    )
    return write_frame(shard_pb2.SessionResponse(load=report))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
