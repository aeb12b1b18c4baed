"""What a shard says of itself, checked before the router reckons with it. Pure."""

from __future__ import annotations

from stagecoach.errors import ModelMismatch
from stagecoach.v1 import model_pb2, shard_pb2

# Positions and vectors of models that exist have some millions at the most, blocks and tokens of a step likewise.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096


def check_description(address: str, description: shard_pb2.DescribeResponse) -> None:
    """Raises ModelMismatch, naming the field, for numbers that no shard can have: zero, absurd, or in disorder.

    Layers 0:0 are those of a shard that has none yet; it then need not have blocks either.
    """
    model, layers = description.model, description.layers
    least = 1 if layers.end else 0
    limits = {
        "model.num_layers": (model.num_layers, 1, MAX_LAYERS),
        "model.hidden_size": (model.hidden_size, 1, MAX_SIZE),
        "model.vocab_size": (model.vocab_size, 1, MAX_SIZE),
        "model.context_length": (model.context_length, 1, MAX_SIZE),
        "layers": (layers.end, least, MAX_LAYERS),
        "block_size": (description.block_size, 1, MAX_SIZE),
        "max_batch_tokens": (description.max_batch_tokens, 1, MAX_SIZE),
        "num_blocks": (description.num_blocks, least, MAX_SIZE),
    }
    for field, (value, minimum, limit) in limits.items():
        if not minimum <= value <= limit:
            raise ModelMismatch(
                f"{field}: {address} has {value}; it must be in [{minimum}, {limit}]",
                field=field,
                limit=limit,
                value=value,
            )
    if layers.start > layers.end - least:
        raise ModelMismatch(
            f"layers: {address} serves {layers.start}:{layers.end}",
            field="layers",
            limit=layers.end,
            value=layers.start,
        )
    if description.dtype not in model_pb2.DType.values():
        raise ModelMismatch(
            f"dtype: {address} has {description.dtype}", field="dtype", limit="a DType", value=description.dtype
        )
