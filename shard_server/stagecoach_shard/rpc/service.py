"""The gRPC service of one shard: Describe, Assign and FetchFiles. The two streams have a file each."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import torch

from stagecoach import PROTOCOL_VERSION, __version__, errors
from stagecoach.errors.status import abort
from stagecoach.file_access import BoundedReads
from stagecoach.rpc.channel import Dial, dial_plainly
from stagecoach.topology import LayerRange
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_shard.checkpoints.checkpoint import Checkpoint
from stagecoach_shard.leases import wire
from stagecoach_shard.leases.assignment import Assignment
from stagecoach_shard.leases.served_stage import ServedStage, StepLimits
from stagecoach_shard.leases.session import check_agreement
from stagecoach_shard.rpc.forward_stream import serve_forward
from stagecoach_shard.rpc.session_stream import serve_session

# A router that gets no chunk for a while takes another shard: so they are small enough for a slow link.
FILE_CHUNK_BYTES = 64 << 10
# What is read at a time.
FILE_PIECE_BYTES = 1 << 20
# A read that hangs keeps its thread, and whoever waits for it comes again.
MAX_FILE_THREADS = 8

Context = grpc.aio.ServicerContext[Any, Any]


class ShardService:
    """Serves the stage that `assignment` has.

    `process_id` is this process's, whatever it serves; while it has no layers, the shard goes by it, too.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        assignment: Assignment,
        *,
        device: torch.device,
        dtype: torch.dtype,
        limits: StepLimits,
        process_id: str,
        dial: Dial = dial_plainly,
    ) -> None:
        self._checkpoint = checkpoint
        self._assignment = assignment
        self._device = device
        self._dtype = dtype
        self._limits = limits
        self._process_id = process_id
        self._dial = dial
        self._reads = BoundedReads(MAX_FILE_THREADS)

    async def describe(self, request: shard_pb2.DescribeRequest, context: Context) -> shard_pb2.DescribeResponse:
        try:
            self._assignment.check_available()
        except errors.StagecoachError as error:
            await abort(context, error)
        return self._description(self._assignment.stage, request.lease_id)

    async def assign(self, request: shard_pb2.AssignRequest, context: Context) -> shard_pb2.AssignResponse:
        """Answers when the layers are loaded, which may take minutes; see `Assignment.assign`."""
        try:
            check_agreement(
                protocol_version=(request.protocol_version, PROTOCOL_VERSION),
                model_fingerprint=(request.model_fingerprint, self._checkpoint.fingerprint),
            )
            stage = await self._assignment.assign(self._range(request.layers))
        except errors.ConfigError as error:  # of loading: nothing that the caller said is wrong
            failure = errors.FailedPrecondition(error.message, field=error.field, limit=error.limit, value=error.value)
            await abort(context, failure)
        except errors.StagecoachError as error:
            await abort(context, error)
        return shard_pb2.AssignResponse(description=self._description(stage, 0))

    async def fetch_files(
        self, request: shard_pb2.FetchFilesRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FileChunk]:
        """A piece at a time, so that callers who do not read have little of this process's memory."""
        try:
            paths = await self._reads.read(self._checkpoint.tokenizer_files, str(self._checkpoint.path))
            for name, path in paths.items():
                async for chunk in _chunks(path, self._reads):
                    yield shard_pb2.FileChunk(name=name, data=chunk)
        except OSError as error:  # TimeoutError is one
            await abort(context, errors.Unavailable(str(error)))

    async def session(self, _: object, context: Context) -> None:
        await serve_session(self._assignment, self._dial, context)

    async def forward(self, _: object, context: Context) -> None:
        await serve_forward(self._assignment, self._limits.max_queued_steps, context)

    def _description(self, stage: ServedStage | None, lease_id: int) -> shard_pb2.DescribeResponse:
        config = self._checkpoint.config
        description = shard_pb2.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            software_version=__version__,
            shard_id=self._process_id,
            process_id=self._process_id,
            model=model_pb2.ModelDescription(
                name=self._checkpoint.name,
                family=config.family,
                fingerprint=self._checkpoint.fingerprint,
                num_layers=config.num_layers,
                hidden_size=config.hidden_size,
                vocab_size=config.vocab_size,
                context_length=config.context_length,
            ),
            layers=model_pb2.LayerRange(),
            dtype=wire.DTYPES[self._dtype],
            device=str(self._device),
            block_size=self._limits.block_size,
            max_batch_tokens=self._limits.max_batch_tokens,
            pid=os.getpid(),
            hostname=socket.gethostname(),
            max_queued_steps=self._limits.max_queued_steps,
            assignable=self._assignment.assignable,
            files_digest=self._checkpoint.files_digest,
        )
        if stage is not None:
            weights, cache = stage.runner.stage, stage.runner.cache
            description.shard_id = stage.shard_id
            description.layers.start, description.layers.end = weights.layers.start, weights.layers.end
            description.num_blocks = cache.num_blocks
            description.num_free_blocks = stage.num_free_blocks(lease_id)
            description.kv_cache_bytes = cache.total_bytes
            description.weights_bytes = weights.weights_bytes
            description.kernels = "native" if weights.is_native else "torch"
        return description

    def _range(self, layers: model_pb2.LayerRange) -> LayerRange:
        """Raises InvalidArgument for an empty range, OutOfRange for layers that the model does not have."""
        wanted = LayerRange(layers.start, layers.end)
        num_layers = self._checkpoint.config.num_layers
        if wanted.end > num_layers:
            raise errors.OutOfRange(
                f"layers {wanted} are asked for; {self._checkpoint.name} has {num_layers}",
                field="layers",
                limit=f"0:{num_layers}",
                value=wanted,
            )
        return wanted


async def _chunks(path: Path, reads: BoundedReads) -> AsyncIterator[bytes]:
    """What is in the file, at least one chunk. Between two pieces it is not even open. Raises OSError."""
    num_bytes = 0
    while True:
        piece = await reads.read(functools.partial(_piece, path, num_bytes), str(path))
        for start in range(0, len(piece), FILE_CHUNK_BYTES):
            yield piece[start : start + FILE_CHUNK_BYTES]
        num_bytes += len(piece)
        if len(piece) < FILE_PIECE_BYTES:
            break
    if num_bytes == 0:
        yield b""


def _piece(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(FILE_PIECE_BYTES)
