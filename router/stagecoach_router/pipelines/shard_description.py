"""What a shard says of itself, checked before the router reckons with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach.errors import ModelMismatch
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2

# Positions and vectors of models that exist have some millions at the most, blocks and tokens of a step likewise.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class ShardDescription:
    """Who the shard at `address` said it is, when it was asked."""

    address: str
    facts: shard_pb2.DescribeResponse

    @property
    def layers(self) -> LayerRange | None:
        """The layers that it serves; None: it has none yet."""
        return LayerRange(self.facts.layers.start, self.facts.layers.end) if self.facts.layers.end else None

    def is_same_process(self, other: ShardDescription) -> bool:
        """Whether this is the other shard, under another address or asked at another time: with the same layers."""
        return bool(self.facts.shard_id) and self.facts.shard_id == other.facts.shard_id

    def check_same_model(self, reference: ShardDescription) -> None:
        """Raises ModelMismatch where the two cannot be in pipelines of one model, nor the one replace the other."""
        ours, theirs = self.facts, reference.facts
        compared = [
            (f"model.{name}", getattr(ours.model, name), getattr(theirs.model, name))
            for name in ("fingerprint", "num_layers", "hidden_size", "vocab_size", "context_length")
        ]
        compared.append(("dtype", model_pb2.DType.Name(ours.dtype), model_pb2.DType.Name(theirs.dtype)))
        compared.append(("block_size", ours.block_size, theirs.block_size))
        for field, our, their in compared:
            check_same(field, self.address, our, reference.address, their)


def check_same(field: str, address: str, value: object, other: str, expected: object) -> None:
    """Raises ModelMismatch, naming both sides, where the shard at `address` has something else than `other` has."""
    if value != expected:
        raise ModelMismatch(
            f"{field}: {address} has {value}, {other} has {expected}",
            field=field,
            limit=expected,
            value=value,
            addresses=[address],
        )


def check_description(address: str, facts: shard_pb2.DescribeResponse) -> None:
    """Raises ModelMismatch, naming the field, for numbers that no shard can have: zero, absurd, or in disorder.

    Layers 0:0 are those of a shard that has none yet; it then need not have blocks either.
    """
    model, layers = facts.model, facts.layers
    least = 1 if layers.end else 0
    limits = {
        "model.num_layers": (model.num_layers, 1, MAX_LAYERS),
        "model.hidden_size": (model.hidden_size, 1, MAX_SIZE),
        "model.vocab_size": (model.vocab_size, 1, MAX_SIZE),
        "model.context_length": (model.context_length, 1, MAX_SIZE),
        "layers": (layers.end, least, MAX_LAYERS),
        "block_size": (facts.block_size, 1, MAX_SIZE),
        "max_batch_tokens": (facts.max_batch_tokens, 1, MAX_SIZE),
        "num_blocks": (facts.num_blocks, least, MAX_SIZE),
    }
    for field, (value, minimum, limit) in limits.items():
        if not minimum <= value <= limit:
            text = f"{field}: {address} has {value}; it must be in [{minimum}, {limit}]"
            raise ModelMismatch(text, field=field, limit=limit, value=value, addresses=[address])
    if layers.start > layers.end - least:
        text = f"layers: {address} serves {layers.start}:{layers.end}"
        raise ModelMismatch(text, field="layers", limit=layers.end, value=layers.start, addresses=[address])
    if facts.dtype not in model_pb2.DType.values():
        text = f"dtype: {address} has {facts.dtype}"
        raise ModelMismatch(text, field="dtype", limit="a DType", value=facts.dtype, addresses=[address])
