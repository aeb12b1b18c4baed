"""How much of what goes from stage to stage fits a message. Pure."""

from __future__ import annotations

from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.framing import MAX_HEADER_BYTES
from stagecoach.v1 import model_pb2

_BYTES_PER_VALUE: dict[int, int] = {
    model_pb2.DTYPE_FLOAT32: 4,
    model_pb2.DTYPE_BFLOAT16: 2,
    model_pb2.DTYPE_FLOAT16: 2,
}


def max_tokens_per_message(hidden_size: int, dtype: int) -> int:
    """Of how many tokens the hidden states fit a message, beside the largest header; one at least.

    `dtype` is a model_pb2.DType, and what is none of hidden states is taken for the largest of those.
    """
    bytes_per_token = hidden_size * _BYTES_PER_VALUE.get(dtype, 4)
    return max(1, (MAX_SHARD_MESSAGE_BYTES - MAX_HEADER_BYTES) // bytes_per_token)
