"""What a shard says of itself, checked before the router reckons with it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from stagecoach.errors import ModelMismatch
from stagecoach.errors.status import clean
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2

# Figures beyond these are no shard's. They are some ten times what exists, and far below what they would cost us: the
# router keeps nothing that is as long as a shard says, but it multiplies these and shows them.
MAX_LAYERS = 4096
MAX_HIDDEN_SIZE = 1 << 20
MAX_VOCAB_SIZE = 1 << 23
MAX_CONTEXT_LENGTH = 1 << 27  # positions
# What a shard's own settings allow.
MAX_BLOCK_SIZE = 1024
MAX_BATCH_TOKENS = 65_536
MAX_QUEUED_STEPS = 1024
MAX_BLOCKS = 2**31 - 1  # what can be named; how many are leased is limited where they are (pipeline_manager.py)
MAX_BYTES = 1 << 50
MAX_PID = 2**31 - 1

# How many bytes of UTF-8 each of a shard's texts may have. They are logged, shown in every status, and compared.
MAX_TEXT_BYTES = {
    "software_version": 64,
    "shard_id": 64,
    "device": 64,
    "kernels": 64,
    "hostname": 255,
    "process_id": 64,
    "files_digest": 64,
    "model.name": 255,  # a folder's
    "model.family": 64,
    "model.fingerprint": 128,
}


@dataclass(frozen=True, slots=True)
class ShardDescription:
    """Who the shard at `address` said it is, when it was asked."""

    address: str
    facts: shard_pb2.DescribeResponse

    @property
    def layers(self) -> LayerRange | None:
        """The layers that it serves; None: it has none yet."""
        return LayerRange(self.facts.layers.start, self.facts.layers.end) if self.facts.layers.end else None

    @property
    def process_id(self) -> str:
        """The same as long as the process lives, whatever layers it loads; "" where it does not say."""
        return self.facts.process_id or self.facts.shard_id

    def is_same_process(self, other: ShardDescription) -> bool:
        """Whether this is the other shard, under another address or asked at another time."""
        return bool(self.process_id) and self.process_id == other.process_id

    def mismatch(self, reference: ShardDescription, *, files_matter: bool = True) -> ModelMismatch | None:
        """Why the two cannot be in pipelines of one model, nor the one replace the other. None: they can.

        A stage needs no tokenizer: one without it fits in with any. Whether one with another does, is `files_matter`.
        """
        try:
            self._check_same_model(reference, files_matter)
        except ModelMismatch as error:
            return error.with_traceback(None)
        return None

    def _check_same_model(self, reference: ShardDescription, files_matter: bool) -> None:
        ours, theirs = self.facts, reference.facts
        compared = [
            (f"model.{name}", getattr(ours.model, name), getattr(theirs.model, name))
            for name in ("fingerprint", "num_layers", "hidden_size", "vocab_size", "context_length")
        ]
        compared.append(("dtype", model_pb2.DType.Name(ours.dtype), model_pb2.DType.Name(theirs.dtype)))
        compared.append(("block_size", ours.block_size, theirs.block_size))
        if files_matter and ours.files_digest and theirs.files_digest:
            compared.append(("files_digest", ours.files_digest, theirs.files_digest))
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
    """Raises ModelMismatch, naming the field, for numbers that no shard can have: zero, absurd, or in disorder; and for
    texts that are too long or cannot be printed.

    Layers 0:0 are those of a shard that has none yet; it then need not have blocks either.
    """
    model, layers = facts.model, facts.layers
    least = 1 if layers.end else 0
    limits = {
        "model.num_layers": (model.num_layers, 1, MAX_LAYERS),
        "model.hidden_size": (model.hidden_size, 1, MAX_HIDDEN_SIZE),
        "model.vocab_size": (model.vocab_size, 1, MAX_VOCAB_SIZE),
        "model.context_length": (model.context_length, 1, MAX_CONTEXT_LENGTH),
        "layers": (layers.end, least, min(MAX_LAYERS, model.num_layers)),
        "block_size": (facts.block_size, 1, MAX_BLOCK_SIZE),
        "max_batch_tokens": (facts.max_batch_tokens, 1, MAX_BATCH_TOKENS),
        "max_queued_steps": (facts.max_queued_steps, 0, MAX_QUEUED_STEPS),
        "num_blocks": (facts.num_blocks, least, MAX_BLOCKS),
        "num_free_blocks": (facts.num_free_blocks, 0, facts.num_blocks),
        "kv_cache_bytes": (facts.kv_cache_bytes, 0, MAX_BYTES),
        "weights_bytes": (facts.weights_bytes, 0, MAX_BYTES),
        "pid": (facts.pid, 0, MAX_PID),
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
    for field, max_bytes in MAX_TEXT_BYTES.items():
        message, name = (model, field.removeprefix("model.")) if field.startswith("model.") else (facts, field)
        _check_text(address, field, getattr(message, name), max_bytes)


def _check_text(address: str, field: str, text: str, max_bytes: int) -> None:
    """Raises ModelMismatch for a text of a shard that is too long, or would not be one line of a log or a terminal."""
    num_bytes = len(text.encode())
    if num_bytes > max_bytes:
        reason = f"{field}: {address} has a text of {num_bytes} bytes; at most {max_bytes}"
        raise ModelMismatch(reason, field=field, limit=max_bytes, value=num_bytes, addresses=[address])
    if clean(text, max_bytes) != text:
        reason = f"{field}: {address} has characters in it that cannot be printed"
        raise ModelMismatch(reason, field=field, limit="printable", value=clean(text, max_bytes), addresses=[address])
