"""How many tokens' hidden states go into a message."""

from __future__ import annotations

import pytest

from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES
from stagecoach.rpc.framing import MAX_HEADER_BYTES
from stagecoach.rpc.message_limits import max_tokens_per_message
from stagecoach.v1 import model_pb2


@pytest.mark.parametrize("hidden_size", [1, 576, 4096, 8192, 16384, 999_983])
@pytest.mark.parametrize(("dtype", "size"), [(model_pb2.DTYPE_FLOAT32, 4), (model_pb2.DTYPE_BFLOAT16, 2)])
def test_as_many_as_fit_beside_the_largest_header(hidden_size: int, dtype: model_pb2.DType, size: int) -> None:
    tokens = max_tokens_per_message(hidden_size, dtype)
    assert tokens * hidden_size * size + MAX_HEADER_BYTES <= MAX_SHARD_MESSAGE_BYTES
    assert (tokens + 1) * hidden_size * size + MAX_HEADER_BYTES > MAX_SHARD_MESSAGE_BYTES


def test_a_step_has_a_token_whatever_the_model_claims_to_be() -> None:
    assert max_tokens_per_message(2**31 - 1, model_pb2.DTYPE_FLOAT32) == 1
